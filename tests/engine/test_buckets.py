"""Shapes that calls are padded to: large enough, few, and within the limits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.engine.buckets import Buckets, round_up


@given(value=st.integers(0, 5000), lowest=st.integers(1, 64), highest=st.integers(5000, 9000))
def test_round_up(value, lowest, highest):
    bucket = round_up(value, lowest=lowest, highest=highest)
    assert value <= bucket <= highest
    assert bucket < 2 * max(value, lowest)
    assert bucket == highest or bucket % lowest == 0
    assert (bucket == highest) or (bucket // lowest).bit_count() == 1


def test_too_large():
    with pytest.raises(ValueError, match="101 exceeds the largest bucket 100"):
        round_up(101, lowest=1, highest=100)


def make(**flags: bool) -> Buckets:
    return Buckets(max_num_seqs=6, max_num_batched_tokens=100, table_width=11, **flags)


def test_few_shapes_hold_all_calls():
    buckets = make()
    assert {buckets.rows(n) for n in range(1, 7)} == {1, 2, 4, 6}
    assert {buckets.prefill_tokens(n) for n in range(1, 101)} == {16, 32, 64, 100}
    assert {buckets.decode_width(n) for n in range(12)} == {4, 8, 11}
    assert [buckets.prefill_rows(n, 16) for n in range(1, 7)] == [1, 2, 4, 4, 6, 6]


@given(count=st.integers(1, 100), tokens=st.integers(1, 100))
def test_padded_prefills_stay_within_the_budget(count, tokens):
    buckets = make()
    width = buckets.prefill_tokens(tokens)
    fit = max(100 // width, 1)
    rows = buckets.prefill_rows(min(count, fit), width)
    assert rows * width <= max(100, width)


def test_fixed_shapes():
    """Nothing that another request does changes them."""
    buckets = make(fixed=True)
    assert {buckets.rows(n) for n in range(1, 7)} == {6}
    assert {buckets.decode_width(n) for n in range(12)} == {11}
    assert {buckets.prefill_width(n) for n in range(12)} == {11}


def test_whole_tables():
    buckets = make(full_tables=True)
    assert {buckets.decode_width(n) for n in range(12)} == {11}
    assert {buckets.prefill_width(n) for n in range(12)} == {4, 8, 11}
    assert {buckets.rows(n) for n in range(1, 7)} == {1, 2, 4, 6}


def test_a_budget_below_the_smallest_bucket():
    buckets = Buckets(max_num_seqs=1, max_num_batched_tokens=5, table_width=2)
    assert [buckets.prefill_tokens(n) for n in (1, 5)] == [5, 5]
    assert [buckets.decode_width(n) for n in (0, 1, 2)] == [2, 2, 2]


def test_long_prompts_are_padded_by_a_quarter_at_most():
    buckets = Buckets(max_num_seqs=1, max_num_batched_tokens=8192, table_width=2)
    padded = {n: buckets.prefill_tokens(n) for n in range(1, 8193)}
    assert all(n <= padded[n] for n in padded)
    assert all(padded[n] <= 1.25 * n + 1 for n in padded if n > 1024)
    assert len(set(padded.values())) == 7 + 3 * 4
    assert (padded[1025], padded[5000], padded[8192]) == (1280, 5120, 8192)
