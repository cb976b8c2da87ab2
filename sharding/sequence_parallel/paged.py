"""Attention over a paged cache whose tokens a mesh axis shares: token g is on rank g mod n.

A rank's pages hold its tokens in ascending order, g at place g // n, so that they are to it a paged
cache like any other, with a page table that is the same on all ranks and lengths of its own. Keys
stay where they are. Queries visit them, and parts of outputs come back and are merged; a context
is longer than what is asked of it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxinfer.pallas_kernels import attention, decode_attention, merge_attention
from jaxinfer.pallas_kernels.attention.pages import gather_pages
from jaxinfer.sharding.sequence_parallel.decode import merge_over_axis
from jaxinfer.sharding.sequence_parallel.exchange import Axis
from jaxinfer.sharding.sequence_parallel.placement import count_before
from jaxinfer.sharding.sequence_parallel.stripes import (
    Part,
    nothing,
    window_before,
    windowed,
    windows,
)


def tokens_held(
    lengths: Int[Array, "*B"], rank: int | jax.Array, num_ranks: int
) -> Int[Array, "*B"]:
    """How many of the first tokens of a sequence are on a rank.

    >>> tokens_held(jnp.array([0, 1, 5]), 1, 4).tolist()
    [0, 0, 1]
    """
    return count_before(lengths, "striped", rank, num_ranks, jnp.iinfo(jnp.int32).max)


def striped_chunk_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    k_pages: Float[Array, "P K p H"],
    v_pages: Float[Array, "P K p H"],
    page_table: Int[Array, "B M"],
    start: Int[Array, "B"],
    num_tokens: Int[Array, "B"],
    *,
    axis_name: Axis,
    local_window_size: int | tuple[int, int] | None = None,
    **options: Any,
) -> Float[Array, "B T N H"]:
    """Attend causally from a chunk that ranks share to all tokens up to each; in `jax.shard_map`.

    Every rank gets all queries, attends to the keys that it has, and sends outputs and
    log-sum-exps back (*pass-Q* in arXiv 2411.01783). The tokens before the chunk are seen by all
    its queries, and those of the chunk by a plain causal mask (`_in_chunk`); so both are calls that
    every implementation of `attention` may serve which has lengths and a log-sum-exp. With a window
    it is one call with an offset instead.

    Args:
        query: `[B, T, N, H]` of a rank's tokens, those whose position is the rank modulo n.
        key: `[B, T, K, H]` of the same tokens.
        value: As `key`.
        k_pages: `[P, K, p, H]` the rank's pages, the keys of the chunk among them.
        v_pages: As `k_pages`.
        page_table: `[B, M]` int32, the same on all ranks.
        start: `[B]` int32 the rank's tokens before the chunk.
        num_tokens: `[B]` int32 the rank's tokens in the chunk, 0 … T; others may hold anything.
        axis_name: Mesh axis of n ranks.
        local_window_size: As in `attention`.
        options: `scale`, `logits_softcap` and `implementation` of `attention`.

    Returns:
        `[B, T, N, H]` in the query's dtype; zeros past `num_tokens`.

    Numerics: parts come in the query's dtype and are merged in float32.

    Memory: all queries of the chunk and three times as many outputs, and a copy of the rank's
    pages.
    """
    rank, n = lax.axis_index(axis_name), lax.axis_size(axis_name)
    k_held, v_held = gather_pages(k_pages, page_table), gather_pages(v_pages, page_table)
    queries, starts, counts = lax.all_gather((query, start, num_tokens), axis_name)
    if local_window_size is None:
        # Rows that are not real would reach others: 0 · NaN is NaN.
        real = (jnp.arange(key.shape[1]) < num_tokens[:, None])[:, :, None, None]
        key, value = jnp.where(real, key, 0), jnp.where(real, value, 0)
        found = _in_two_parts(queries, starts, key, value, k_held, v_held, start, rank, **options)
    else:
        left = window_before(local_window_size)
        found = _in_window(
            queries, starts, counts, k_held, v_held, start + num_tokens, rank, left, **options
        )
    out, lse = (lax.all_to_all(x, axis_name, split_axis=0, concat_axis=0) for x in found)
    merged = merge_attention([(out[i], lse[i]) for i in range(n)])[0]
    real = jnp.arange(query.shape[1]) < num_tokens[:, None]
    return jnp.where(real[:, :, None, None], merged, 0)


def _in_two_parts(
    queries: jax.Array, starts: jax.Array, key: jax.Array, value: jax.Array,
    before_key: jax.Array, before_value: jax.Array, start: jax.Array, rank: jax.Array,
    **options: Any,
) -> Part:  # fmt: skip
    """Parts `[n, B, T, …]` of the queries of all ranks, over the tokens before the chunk and in it.

    Key j of a rank's chunk is seen by query i of another if j <= i, or if j < i where the rank's
    first token comes later. Moved back by one, as if each were the one before it, such queries have
    the plain mask too: the first, which sees none, comes last and is left out. Then all ranks'
    queries have one mask, and can be heads of one call.
    """
    n, B, T, N, H = queries.shape
    K, ranks = key.shape[2], jnp.arange(n, dtype=jnp.int32)
    later = starts - start < (rank > ranks)[:, None]  # [n, B]
    index = jnp.arange(T, dtype=jnp.int32)
    moved = (index + later[..., None]) % T  # [n, B, T] where a place takes its query from
    placed = jnp.take_along_axis(queries, moved[..., None, None], axis=2)
    grouped = placed.reshape(n, B, T, K, N // K, H).transpose(1, 2, 3, 0, 4, 5)
    heads = grouped.reshape(B, T, n * N, H)
    out, lse = attention(heads, key, value, is_causal=True, return_residual=True, **options)
    first = later[..., None] & (index == T - 1)  # [n, B, T]
    first = jnp.repeat(first.transpose(1, 2, 0), N // K, axis=2)  # [B, T, n·G]
    lse = jnp.where(jnp.tile(first, (1, 1, K)), -jnp.inf, lse)
    before = attention(
        heads, before_key, before_value, key_value_seq_lengths=start, return_residual=True,
        **options,
    )  # fmt: skip
    back = (index - later[..., None]) % T

    def of_ranks(x: jax.Array) -> jax.Array:
        x = x.reshape(B, T, K, n, N // K, -1).transpose(3, 0, 1, 2, 4, 5).reshape(n, B, T, N, -1)
        return jnp.take_along_axis(x, back[..., None, None], axis=2)

    out, lse = merge_attention([before, (out, lse)])
    return of_ranks(out), of_ranks(lse)[..., 0]


def _in_window(
    queries: jax.Array, starts: jax.Array, counts: jax.Array, key: jax.Array, value: jax.Array,
    held: jax.Array, rank: jax.Array, left: int | None, **options: Any,
) -> Part:  # fmt: skip
    """As `_in_two_parts`, over the `held` `[B]` tokens in the pages."""
    n = len(queries)

    def from_rank(asking):
        query, start, count, source = asking

        def part(**window):
            out, lse = attention(
                query, key, value, is_causal=True,
                q_offset=jnp.where(rank <= source, start, start - 1), query_seq_lengths=count,
                key_value_seq_lengths=held, return_residual=True, **window, **options,
            )  # fmt: skip
            return out.astype(jnp.float32), lse

        out, lse = windowed(part, query, left=left, apart=(source - rank) % n, num_ranks=n)
        return out.astype(query.dtype), lse

    return lax.map(from_rank, (queries, starts, counts, jnp.arange(n, dtype=jnp.int32)))


def striped_decode_attention(
    query: Float[Array, "B 1 N H"],
    k_pages: Float[Array, "P K p H"],
    v_pages: Float[Array, "P K p H"],
    page_table: Int[Array, "B M"],
    lengths: Int[Array, "B"],
    *,
    axis_name: Axis,
    local_window_size: int | tuple[int, int] | None = None,
    **options: Any,
) -> Float[Array, "B 1 N H"]:
    """Attend from the last token of every row, which all ranks have; in `jax.shard_map`.

    Args:
        query: `[B, 1, N, H]`, the same on all ranks.
        k_pages: `[P, K, p, H]` the rank's pages, with the last token's key where it belongs.
        v_pages: As `k_pages`.
        page_table: `[B, M]` int32, the same on all ranks.
        lengths: `[B]` int32 tokens of every row on all ranks together, the last one included.
        axis_name: Mesh axis of n ranks.
        local_window_size: As in `decode_attention`.
        options: `scale`, `logits_softcap`, `softmax`, `counters` and `implementation` of
            `decode_attention`.

    Returns:
        `[B, 1, N, H]` in the query's dtype, the same on all ranks; zeros for rows of length 0.

    Where a window is no multiple of n, one or the other of two windows holds for a row; both are
    computed.
    """
    rank, n = lax.axis_index(axis_name), lax.axis_size(axis_name)
    held = tokens_held(lengths, rank, n)

    def attend(window: int | None):
        out, lse = decode_attention(
            query, k_pages, v_pages, page_table, held, local_window_size=window,
            return_residual=True, **options,
        )  # fmt: skip
        return out, lse

    left = window_before(local_window_size)
    if left is None:
        return merge_over_axis(*attend(None), axis_name)[0]
    wide, narrow, last = windows(left, n)
    out, lse = attend(wide)
    if last < n - 1:
        other, other_lse = nothing(query) if narrow is None else attend(narrow)
        near = ((lengths - 1 - rank) % n <= last)[:, None, None]
        out = jnp.where(near[..., None], out, other.astype(out.dtype))
        lse = jnp.where(near, lse, other_lse)
    return merge_over_axis(out, lse, axis_name)[0]
