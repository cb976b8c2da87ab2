"""How one decode-attention call is divided over the GPU: equal shares of the real work.

The work is a list of units, one unit being `block` keys of one KV head of one request, ordered by
(head, request, block). CTA c takes units `[c·share, (c+1)·share)`, whatever requests they belong
to, so ragged lengths cost no balance. Where a CTA boundary falls inside a segment (all units of
one head and request), that segment's result comes in pieces that a second pass merges.

A piece is the part of segment s that CTA c computes; it is stored at index c + s. Walking through
the units, every new piece raises c or s or both, so no two pieces share an index and the pieces of
one segment are neighbours.

The plan is computed on the device from `lengths`: lengths change every step and must not
recompile anything.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DecodePlan:
    """Work division of one call; every field is an int32 array.

    Attributes:
        first_block: `[B]` first block of each request that any query can see.
        end_block: `[B]` one past the last block; equal to `first_block` for empty requests.
        before: `[B + 1]` blocks of all earlier requests (for one head).
        next_request: `[B]` the following request that has blocks, cyclic.
        starts: `[C, 4]` per CTA: head, request, block of its first unit, and number of units.
        share: `[1]` units per CTA.
    """

    first_block: jax.Array
    end_block: jax.Array
    before: jax.Array
    next_request: jax.Array
    starts: jax.Array
    share: jax.Array


def plan_decode(
    lengths: jax.Array,
    *,
    num_tokens: int,
    num_kv_heads: int,
    block: int,
    num_ctas: int,
    left_window: int | None = None,
) -> DecodePlan:
    """Divide the keys of `lengths` over `num_ctas` CTAs.

    Args:
        lengths: `[B]` int32, keys of each request, its query tokens included.
        num_tokens: T, query tokens of each request.
        num_kv_heads: K.
        block: Keys per unit.
        num_ctas: C.
        left_window: Keys that a query sees before its own position; None: all.
    """
    lengths = lengths.astype(jnp.int32)
    B = lengths.shape[0]
    end = (lengths + block - 1) // block
    if left_window is None:
        first = jnp.zeros_like(end)
    else:
        first = jnp.maximum(lengths - num_tokens - left_window, 0) // block
    first = jnp.minimum(first, end)
    blocks = end - first
    before = jnp.concatenate([jnp.zeros((1,), jnp.int32), jnp.cumsum(blocks, dtype=jnp.int32)])
    per_head = before[-1]
    total = per_head * num_kv_heads
    share = jnp.maximum((total + num_ctas - 1) // num_ctas, 1)

    unit = jnp.arange(num_ctas, dtype=jnp.int32) * share
    count = jnp.clip(total - unit, 0, share)
    head = unit // jnp.maximum(per_head, 1)
    within = unit - head * per_head
    # The request that holds unit `within`: how many requests end at or before it.
    request = jnp.sum(before[None, 1:] <= within[:, None], axis=1, dtype=jnp.int32)
    request = jnp.minimum(request, B - 1)
    start_block = first[request] + within - before[request]

    index = jnp.arange(B, dtype=jnp.int32)
    distance = (index[None, :] - index[:, None] - 1) % B  # 0: the one that follows
    distance = jnp.where((blocks > 0)[None, :], distance, B)
    next_request = (index + 1 + jnp.min(distance, axis=1)) % B
    return DecodePlan(
        first_block=first,
        end_block=end,
        before=before,
        next_request=next_request.astype(jnp.int32),
        starts=jnp.stack([head, request, start_block, count], axis=1).astype(jnp.int32),
        share=share[None].astype(jnp.int32),
    )


def num_pieces(*, batch: int, num_kv_heads: int, num_ctas: int) -> int:
    """Upper bound on piece indices: the largest c + s, plus one."""
    return num_ctas + batch * num_kv_heads - 1
