"""Decode attention over keys and values that are sharded over a mesh axis."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxinfer.pallas_kernels import attention
from jaxinfer.pallas_kernels.dispatch import Implementation
from jaxinfer.sharding.sequence_parallel.arguments import per_row
from jaxinfer.sharding.sequence_parallel.exchange import Axis
from jaxinfer.sharding.sequence_parallel.placement import (
    Placement,
    chunks_per_rank,
    count_before,
)


def merge_over_axis(
    out: Float[Array, "*B H"], lse: Float[Array, "*B"], axis_name: Axis
) -> tuple[Float[Array, "*B H"], Float[Array, "*B"]]:
    """`merge_attention` of the parts that the ranks of an axis hold; inside `jax.shard_map`.

    Ranks send outputs, never keys: one maximum and one sum of `[..., H + 1]` numbers per query.

    Args:
        out: Output over the rank's keys, any float dtype.
        lse: Natural-log log-sum-exp, float32; -inf where the rank has no visible key.
        axis_name: Mesh axis whose ranks hold disjoint keys.

    Returns:
        The same on all ranks: output in the dtype of `out`, log-sum-exp in float32.
    """
    peak = lax.pmax(lse, axis_name)
    peak = jnp.where(jnp.isinf(peak), 0.0, peak)
    weight = jnp.exp(lse - peak)[..., None]
    sums = lax.psum(jnp.concatenate([out.astype(jnp.float32) * weight, weight], -1), axis_name)
    total = sums[..., -1]
    safe = jnp.where(total > 0, total, 1.0)
    merged = (sums[..., :-1] / safe[..., None]).astype(out.dtype)
    return merged, jnp.where(total > 0, peak + jnp.log(safe), -jnp.inf)


def sharded_decode_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    lengths: Int[Array, "B"] | Int[Array, ""] | int,
    *,
    axis_name: Axis,
    placement: Placement = "contiguous",
    scale: float | None = None,
    implementation: Implementation = None,
    return_residual: bool = False,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attend from the last tokens of every row to a cache that is sharded over its tokens.

    Query token t of row b sits at position `lengths[b] - T + t` and sees the keys up to its own
    position, as in `decode_attention`. Call it inside `jax.shard_map`, with the same queries on
    all ranks. Caches in pages have the same door: `decode_attention(..., return_residual=True)`
    over the rank's pages, with lengths from `count_before`, then `merge_over_axis`.

    Args:
        query: `[B, T, N, H]`; each token is one more call, T is 1 or small.
        key: `[B, S, K, H]`, S the cache's slots of one rank; K divides N.
        value: As `key`.
        lengths: Tokens in the whole cache, those of the call included: an int, a scalar or `[B]`.
        axis_name: Mesh axis of n ranks that hold the cache.
        placement: Which tokens a rank holds, as in `place`; the cache has n·S slots in all.
        scale: Factor on q·k; default 1/sqrt(H).
        implementation: Of the local attention, as in `attention`.
        return_residual: Also return the log-sum-exp of the logits.

    Returns:
        The same on all ranks: `[B, T, N, H]` in the query's dtype; with `return_residual` also
        `[B, T, N]` float32. Tokens that see no key give zeros and -inf.

    Raises:
        ValueError: shapes that do not fit together, or an odd S with zigzag.
        TypeError: dtypes that differ, or lengths that are no integers.
        NotSupported: the implementation asked for by name cannot serve the call.
    """
    B, T = query.shape[:2]
    slots = key.shape[1]
    if slots % chunks_per_rank(placement):
        raise ValueError(f"zigzag needs an even number of slots per rank; got {slots}")
    tokens = per_row(lengths, B)
    if tokens is None:
        raise TypeError("lengths must be integers; got None")
    rank, n = lax.axis_index(axis_name), lax.axis_size(axis_name)
    parts = []
    for t in range(T):
        # In every placement the keys before a position are the first ones of a rank's block.
        visible = count_before(tokens - T + t + 1, placement, rank, n, slots)
        parts.append(attention(
            query[:, t : t + 1], key, value, key_value_seq_lengths=visible, scale=scale,
            implementation=implementation, return_residual=True,
        ))  # fmt: skip
    out, lse = (jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True))
    out, lse = merge_over_axis(out, lse, axis_name)
    return (out, lse) if return_residual else out
