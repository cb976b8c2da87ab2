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
from jaxinfer.sharding.sequence_parallel.stripes import nothing, window_before, windowed, windows


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
    log-sum-exps back (*pass-Q* in arXiv 2411.01783).

    Args:
        query: `[B, T, N, H]` of a rank's tokens, those whose position is the rank modulo n.
        k_pages: `[P, K, p, H]` its pages, the keys of the chunk among them.
        v_pages: As `k_pages`.
        page_table: `[B, M]` int32, the same on all ranks.
        start: `[B]` int32 the rank's tokens before the chunk.
        num_tokens: `[B]` int32 the rank's tokens in the chunk, 0 … T.
        axis_name: Mesh axis of n ranks.
        local_window_size: As in `attention`.
        options: `scale`, `logits_softcap` and `implementation` of `attention`.

    Returns:
        `[B, T, N, H]` in the query's dtype; zeros past `num_tokens`.

    Numerics: parts come in the query's dtype and are merged in float32.

    Memory: all queries of the chunk and as many outputs, and a copy of the rank's pages.
    """
    rank, n = lax.axis_index(axis_name), lax.axis_size(axis_name)
    left = window_before(local_window_size)
    key, value = gather_pages(k_pages, page_table), gather_pages(v_pages, page_table)
    held = start + num_tokens

    def from_rank(asking):
        query, start, count, source = asking

        def attend(**window):
            return attention(
                query, key, value, is_causal=True,
                q_offset=jnp.where(rank <= source, start, start - 1), query_seq_lengths=count,
                key_value_seq_lengths=held, return_residual=True, **window, **options,
            )  # fmt: skip

        def part(**window):
            out, lse = attend(**window)
            return out.astype(jnp.float32), lse

        out, lse = windowed(part, query, left=left, apart=(source - rank) % n, num_ranks=n)
        return out.astype(query.dtype), lse

    asking = lax.all_gather((query, start, num_tokens), axis_name)
    found = lax.map(from_rank, (*asking, jnp.arange(n, dtype=jnp.int32)))
    out, lse = (lax.all_to_all(x, axis_name, split_axis=0, concat_axis=0) for x in found)
    return merge_attention([(out[i], lse[i]) for i in range(n)])[0]


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
        options: `scale`, `logits_softcap`, `softmax` and `implementation` of `decode_attention`.

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
