"""Attention over pages whose tokens ranks share equals attention over the whole cache."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxinfer.sharding.sequence_parallel.paged import (
    striped_chunk_attention,
    striped_decode_attention,
    tokens_held,
)
from tests.metrics import assert_dtype_close
from tests.ops import oracle
from tests.ops.cases import quick_compilation
from tests.sharding.eight_devices.runs import mesh_of, numbers

PAGE = 4  # tokens of a page on one rank
WINDOWS = (None, 0, 2, 3, 7, (10, 0))
PAGES = P(None, None, "seq")


def pages_of(x: np.ndarray, n: int, table: np.ndarray) -> jax.Array:
    """`[B, S, K, H]` in pages `[P, K, n·p, H]`, rank after rank; other slots hold NaN."""
    B, S, K, H = x.shape
    pages = np.full((table.size, K, n, PAGE, H), np.nan, x.dtype)
    for b in range(B):
        for g in range(S):
            page, place = table[b, g // (n * PAGE)], g // n % PAGE
            pages[page, :, g % n, place] = x[b, g]
    return jnp.asarray(pages.reshape(table.size, K, n * PAGE, H))


def run(function, n: int, query, query_spec, key, value, lengths, *rows, **options: Any):
    """Call a function of queries and pages on n ranks; pages end where `lengths` do."""
    held = (np.arange(key.shape[1]) < lengths[:, None])[:, :, None, None]
    B, width = len(lengths), -(-key.shape[1] // (n * PAGE))
    table = np.random.default_rng(3).permutation(B * width).reshape(B, width).astype(np.int32)
    k_pages, v_pages = (pages_of(np.where(held, x, np.nan), n, table) for x in (key, value))
    specs = (query_spec, PAGES, PAGES, P(), *(P("seq") for _ in rows))
    call = jax.jit(jax.shard_map(
        lambda query, k, v, table, *rows: function(
            query, k, v, table, *(row[0] for row in rows), axis_name="seq", **options
        ),
        mesh=mesh_of(n), in_specs=specs, out_specs=query_spec, check_vma=False,
    ))  # fmt: skip
    with quick_compilation():
        return call(query, k_pages, v_pages, jnp.asarray(table), *rows)


def every_rank(values, n: int) -> np.ndarray:
    """`[n, B]`, a row for each rank."""
    return np.stack([np.asarray(tokens_held(jnp.asarray(values), r, n)) for r in range(n)])


def arrays(B: int, S: int, n: int):
    return [np.array(numbers((B, S, heads, 8), i)) for i, heads in enumerate((6, 3, 3))]


@pytest.mark.parametrize("n", [3, 4])
@pytest.mark.parametrize("window", WINDOWS)
def test_the_last_token(n, window):
    """Rows that end on each rank, an empty one, one that fills its pages."""
    S = n * PAGE * 2
    lengths = np.array([S, 0, 1, n, n + 1, n + 2, 3 * n + 2])
    query, key, value = arrays(len(lengths), S, n)
    lens = np.broadcast_to(lengths.astype(np.int32), (n, len(lengths)))
    got = run(
        striped_decode_attention, n, jnp.asarray(query[:, :1]), P(), key, value, lengths, lens,
        local_window_size=window, logits_softcap=2.0,
    )  # fmt: skip
    want, _ = oracle.attention(
        query[:, :1], key, value, is_causal=True, q_offset=lengths - 1, logits_softcap=2.0,
        key_value_seq_lengths=lengths, local_window_size=window,
    )  # fmt: skip
    assert_dtype_close(got, want, "float32")


@pytest.mark.parametrize("n", [3, 4])
@pytest.mark.parametrize("window", WINDOWS)
def test_a_chunk(n, window):
    """Rows begin on different ranks, and have from no token to as many as fit."""
    S = n * PAGE * 2
    begin, count = np.array([0, 1, n, 2 * n + 1, S - 9, 5]), np.array([9, 1, 2, 8, 9, 0])
    lengths = begin + count
    query, key, value = arrays(len(begin), S, n)
    start, end = every_rank(begin, n), every_rank(lengths, n)
    t = -(-9 // n)

    def mine(x: np.ndarray) -> jax.Array:
        """The chunk's tokens by rank, `[B, n·t, …]`; NaN where there are none."""
        chunk = np.full((len(begin), n, t, *x.shape[2:]), np.nan, np.float32)
        for r in range(n):
            for b in range(len(begin)):
                at = np.arange(start[r, b], end[r, b]) * n + r
                chunk[b, r, : len(at)] = x[b, at]
        return jnp.asarray(chunk.reshape(len(begin), n * t, *x.shape[2:]))

    def of_chunk(chunk, k_pages, v_pages, table, start, count, **options):
        q, k, v = chunk
        return striped_chunk_attention(q, k, v, k_pages, v_pages, table, start, count, **options)

    got = run(
        of_chunk, n, tuple(map(mine, (query, key, value))), P(None, "seq"), key, value, lengths,
        start, end - start, local_window_size=window,
    )  # fmt: skip
    got = np.asarray(got).reshape(len(begin), n, t, 6, 8)
    for b in range(len(begin)):
        want, _ = oracle.attention(
            query[b : b + 1, begin[b] : lengths[b]], key[b : b + 1], value[b : b + 1],
            is_causal=True, q_offset=begin[b], local_window_size=window,
        )  # fmt: skip
        for r in range(n):
            at = np.arange(start[r, b], end[r, b]) * n + r - begin[b]
            assert not got[b, r, len(at) :].any()
            if len(at):
                assert_dtype_close(got[b, r, : len(at)], want[0, at], "float32")
