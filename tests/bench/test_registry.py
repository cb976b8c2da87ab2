"""The registry: every op's cases, and how they are chosen."""

import collections
import math

import pytest

from bench.registry import OPS, cases_of, pick, select
from bench.whole_model import dtype

TAGS = {"primary", "stress", "ci"}


@pytest.mark.parametrize("op", OPS)
def test_cases_of_an_op(op):
    cases = cases_of(op)
    names = collections.Counter(case.name for case in cases)
    assert [name for name, count in names.items() if count > 1] == []
    assert {case.tag for case in cases} <= TAGS
    assert {"primary", "ci"} <= {case.tag for case in cases}
    for case in cases:
        assert case.name == case.name.lower()
        assert math.isfinite(case.flops)
        assert math.isfinite(case.bytes)
        assert case.flops > 0
        assert case.bytes > 0
        assert case.implementations[0] == "dispatch"
        assert len(set(case.implementations)) == len(case.implementations)


def counts(op, name):
    """Operations and bytes of a case."""
    (case,) = (case for case in cases_of(op) if case.name == name)
    return case.flops, case.bytes


def test_counts_of_attention():
    flops, size = counts("attention", "llama-3-8b b1 t1024 causal")
    assert flops == pytest.approx(4 * 32 * 128 * 1024**2 / 2, rel=2e-3)  # Q·Kᵀ and P·V, half
    assert size == 2 * 1024 * 128 * (2 * 32 + 2 * 8)


def test_counts_of_decode_attention():
    flops, size = counts("decode_attention", "llama-3-8b b8 s1024")
    assert flops == 8 * 4 * 32 * 128 * 1024
    assert size == pytest.approx(8 * 2 * 2 * 8 * 128 * 1024, rel=1e-2)


def test_counts_of_add_rms_norm():
    assert counts("add_rms_norm", "llama-3-8b m64 d4096")[1] == 2 * 4096 * (4 * 64 + 1)


@pytest.mark.parametrize("op", ["decode_attention", "e2e_decode"])
def test_counts_grow_with_the_batch(op):
    small, large = (counts(op, f"llama-3-8b b{B} s1024") for B in (1, 8))
    assert large[0] == pytest.approx(8 * small[0], rel=1e-6)
    assert small[1] < large[1] <= 8 * small[1]


def test_counts_of_a_whole_model_hold_its_weights():
    for op, name in ("e2e_decode", "llama-3-8b b1 s1024"), ("e2e_prefill", "llama-3-8b b1 t1024"):
        assert counts(op, name)[1] == pytest.approx(dtype().itemsize * 7.5e9, rel=0.05)


def test_unknown_op_names_the_near_one():
    with pytest.raises(ValueError, match=r"unknown op 'atention'; did you mean 'attention'\?"):
        cases_of("atention")


def test_unknown_op_without_a_near_one_names_all():
    with pytest.raises(ValueError, match="unknown op 'zzz'; known: attention, decode_attention"):
        cases_of("zzz")


def test_select_by_tag_and_words():
    cases = cases_of("decode_attention")
    assert {case.tag for case in select(cases, tag="ci", words=[])} == {"ci"}
    assert len(select(cases, tag="all", words=[])) == len(cases)
    chosen = select(cases, tag="primary", words=["s1024", "llama-3-8b", "b1"])
    assert [case.name for case in chosen] == ["llama-3-8b b1 s1024"]
    assert select(cases, tag="primary", words=["llama"]) == [], "words are whole words"


def test_pick():
    case = cases_of("add_rms_norm")[0]
    assert pick(case, []) == ["dispatch", "mosaic", "xla"]
    assert pick(case, ["xla", "dispatch"]) == ["xla", "dispatch"]
    with pytest.raises(ValueError, match=r"no implementation 'mosiac'; did you mean 'mosaic'\?"):
        pick(case, ["xla", "mosiac"])
