"""`decode_attention` in plain JAX."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.pallas_kernels.attention.api import attention
from jaxinfer.pallas_kernels.decode_attention.specs import SPECS, DecodeSpec, make_inputs
from tests.metrics import assert_dtype_close
from tests.ops import oracle
from tests.ops.cases import cases, inputs, same_bits
from tests.ops.decode_attention.calls import call_reference, check, op
from tests.ops.paging import poison

SMALL = DecodeSpec(model="small", B=3, S=24, N=4, K=2, H=8, T=2, page_size=4, dtype="float32",
                   lengths=(24, 0, 11))  # fmt: skip


@pytest.mark.parametrize("spec", cases(SPECS, "ci"))
def test_matches_reference(spec):
    arrays = inputs(make_inputs, spec, 2)
    check(spec, jax.jit(op("xla", spec))(*arrays), call_reference(spec, arrays))


@pytest.mark.parametrize("changes", [
    {"page_size": 1}, {"page_size": 5}, {"N": 9, "K": 3, "H": 7}, {"K": 4}, {"T": 8},
    {"lengths": (1, 1, 1), "T": 1}, {"logits_softcap": 0.5}, {"local_window_size": 0},
], ids=str)  # fmt: skip
def test_odd_sizes(changes):
    spec = dataclasses.replace(SMALL, **changes)
    arrays = inputs(make_inputs, spec, 3)
    want = oracle.decode_attention(*arrays, **spec.options)
    got = jax.jit(op("xla", spec))(*arrays)
    for one, expected in zip(got, want, strict=True):
        assert_dtype_close(one, expected, "float32")


def test_equals_attention_over_the_same_pages():
    """A decode step is a chunk of prefill whose last token is the last key."""
    query, k_pages, v_pages, table, lengths = inputs(make_inputs, SMALL, 4)
    dense = attention(
        query, k_pages, v_pages, page_table=table, is_causal=True, q_offset=lengths - SMALL.T,
        key_value_seq_lengths=lengths, return_residual=True, implementation="xla",
    )  # fmt: skip
    got = op("xla")(query, k_pages, v_pages, table, lengths)
    for one, other in zip(got, dense, strict=True):
        assert_dtype_close(one, other, "float32")


def test_unused_pages_and_slots_may_hold_anything():
    query, k_pages, v_pages, table, lengths = inputs(make_inputs, SMALL, 5)
    clean = op("xla")(query, k_pages, v_pages, table, lengths)
    dirty = poison(k_pages, v_pages, table, lengths)
    assert int(jnp.isnan(dirty[0]).all(axis=(1, 3)).sum()) == k_pages.shape[0] * 4 - 24 - 11
    same_bits(op("xla")(query, *dirty, lengths), clean)
