"""What must hold of `attention` whatever the numbers are."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.pallas_kernels.attention.merge import merge_attention
from tests.metrics import assert_close, assert_dtype_close
from tests.ops.attention.calls import xla, xla_residual
from tests.ops.cases import normal, same_bits
from tests.ops.paging import paged

shift = jax.jit(lambda x, first: jnp.roll(x, -first, axis=1))


def qkv(T=24, S=24, N=4, K=2, H=16, B=2):
    return normal(0, (B, T, N, H)), normal(1, (B, S, K, H)), normal(2, (B, S, K, H))


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 23), max_size=3, unique=True).map(sorted), st.booleans())
def test_chunked_prefill_equals_whole_prefill(cuts, window):
    """Chunks padded to one length, as the engine sends them."""
    query, key, value = qkv()
    size = 5 if window else None
    whole = xla(query, key, value, is_causal=True, local_window_size=size)
    for a, b in itertools.pairwise([0, *cuts, 24]):
        chunk = xla(
            shift(query, a), key, value, is_causal=True, local_window_size=size,
            q_offset=jnp.full((2,), a), query_seq_lengths=jnp.full((2,), b - a),
        )  # fmt: skip
        assert_dtype_close(chunk[:, : b - a], whole[:, a:b], "float32")
        assert not chunk[:, b - a :].any()


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(0, 24), st.integers(0, 24))
def test_parts_of_the_keys_merge_to_the_whole(a, b):
    """Three ranges of keys, empty ones too, each attended alone."""
    query, key, value = qkv()
    want_out, want_lse = xla_residual(query, key, value)
    parts = [
        xla_residual(
            query,
            shift(key, first),
            shift(value, first),
            key_value_seq_lengths=jnp.full((2,), end - first),
        )
        for first, end in itertools.pairwise([0, *sorted((a, b)), 24])
    ]
    out, lse = merge_attention(parts)
    assert_dtype_close(out, want_out, "float32")
    assert_close(lse, want_lse, rms=1e-6, max_abs=1e-5)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.sampled_from([1, 3, 8, 16, 32]), st.integers(0, 2**30))
def test_pages_of_any_size_in_any_order_change_nothing(page_size, seed):
    query, key, value = qkv()
    lengths = jnp.array([24, 10])
    want = xla_residual(query, key, value, is_causal=True, key_value_seq_lengths=lengths)
    k_pages, v_pages, table = paged(key, value, page_size=page_size, seed=seed)
    got = xla_residual(
        query, k_pages, v_pages, page_table=table, is_causal=True, key_value_seq_lengths=lengths
    )
    for one, other in zip(got, want, strict=True):
        assert_dtype_close(one, other, "float32")


def test_unused_pages_and_slots_may_hold_anything():
    query, key, value = qkv(T=3)
    lengths = jnp.array([20, 5])
    k_pages, v_pages, table = paged(key, value, page_size=8, seed=0, spare=2)
    table = table.at[1, 1:].set(10_000)  # past the row's length: not a page
    used = np.zeros(k_pages.shape[0], bool)
    used[np.asarray(table[0])] = used[int(table[1, 0])] = True
    options = {"page_table": table, "key_value_seq_lengths": lengths}
    clean = xla(query, k_pages, v_pages, **options)
    is_used = used[:, None, None, None]
    k_pages, v_pages = (jnp.where(is_used, x, jnp.nan) for x in (k_pages, v_pages))
    last = int(table[0, 2])
    k_pages, v_pages = (x.at[last, :, 4:].set(jnp.nan) for x in (k_pages, v_pages))
    same_bits(xla(query, k_pages, v_pages, **options), clean)


def test_a_causal_call_does_not_see_the_future():
    query, key, value = qkv()
    changed = xla(query, key.at[:, 12:].add(1), value.at[:, 12:].add(1), is_causal=True)
    same_bits(changed[:, :12], xla(query, key, value, is_causal=True)[:, :12])


def test_adding_a_constant_to_all_logits_changes_only_the_lse():
    """Softmax does not see a shift: one more dimension adds 3 to each logit."""
    query, key, value = qkv()
    query, key = (jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1) for x in (query, key))
    value = jnp.concatenate([value, jnp.zeros_like(value[..., :1])], axis=-1)
    base = xla_residual(query, key, value, scale=1.0)
    query = query.at[..., -1].set(4.0)
    shifted = xla_residual(query, key, value, scale=1.0)
    assert_dtype_close(shifted[0], base[0], "float32")
    assert_close(shifted[1] - 3.0, base[1], rms=1e-5, max_abs=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_runs_give_equal_bits(dtype):
    arrays = [x.astype(dtype) for x in qkv()]
    first, second = (xla_residual(*arrays, is_causal=True) for _ in range(2))
    same_bits(first, second)


def test_grouped_heads_equal_repeated_ones():
    query, key, value = qkv(N=6, K=2)
    repeated = [jnp.repeat(x, 3, axis=2) for x in (key, value)]
    assert_dtype_close(xla(query, key, value), xla(query, *repeated), "float32")


def test_a_large_soft_cap_is_none_and_a_small_one_is_uniform():
    query, key, value = qkv()
    capped = xla(query, key, value, logits_softcap=1e5)
    assert_close(capped, xla(query, key, value), rms=1e-4, max_abs=1e-3)
    uniform = xla(query, key, value, logits_softcap=1e-6)
    mean = jnp.repeat(value.mean(axis=1, keepdims=True), 2, axis=2)
    assert_dtype_close(uniform, jnp.broadcast_to(mean, uniform.shape), "float32")
