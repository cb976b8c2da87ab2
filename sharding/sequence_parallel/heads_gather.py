"""All-gather of one group of KV heads after the other (the context parallelism of Llama 3).

Every stage has all tokens of its heads, so that without a mask nothing is merged. Under a causal
mask a chunk of queries attends to its own tokens and to those before them, in two calls: in one it
would need an offset, which fast implementations have not, or only by a mask of T·S elements.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels import merge_attention
from jaxinfer.sharding.schedule import Schedule
from jaxinfer.sharding.sequence_parallel.exchange import Axis
from jaxinfer.sharding.sequence_parallel.placement import unplace
from jaxinfer.sharding.sequence_parallel.step import Local, Part


def gather_heads(
    local: Local,
    schedule: Schedule,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    axis_name: Axis,
) -> Part:
    """Attend over all ranks' keys and values, m groups of KV heads in turn.

    Args:
        local: The rank's attention; its layout has one piece.
        schedule: An `all_gather` of m pieces; m divides K.
        query: `[B, c, N, H]`.
        key: `[B, c, K, H]`.
        value: As `key`.
        axis_name: Mesh axis of n ranks.

    Returns:
        Output `[B, c, N, H]` and log-sum-exp `[B, c, N]`, float32.

    Memory: `4·S·K/m·H` elements, for the group that is attended to and the one that arrives.
    """
    stages = schedule.pieces_per_rank
    groups = jnp.split(jnp.stack([key, value]), stages, axis=3)
    queries = jnp.split(query, stages, axis=2)
    parts: list[Part] = []
    arriving = gather(groups[0], axis_name)
    for stage in range(stages):
        gathered = arriving
        if stage + 1 < stages:
            arriving = gather(groups[stage + 1], axis_name)
        parts.append(_attend(local, queries[stage], gathered))
    out, lse = (jnp.concatenate(x, axis=2) for x in zip(*parts, strict=True))
    return out, lse


def gather(group: jax.Array, axis_name: Axis) -> jax.Array:
    """`[n, ...]` what all ranks have of a group.

    Args:
        group: `[2, B, c, K/m, H]` keys and values of a rank's tokens, some of their heads.
        axis_name: Mesh axis of n ranks.
    """
    return lax.all_gather(group, axis_name)


def _attend(local: Local, query: jax.Array, gathered: jax.Array) -> Part:
    """Attend over gathered blocks `[n, 2, B, c, K, H]`."""
    layout = local.layout
    n = layout.num_ranks
    if layout.placement == "striped" and local.is_causal:
        # The distance between a rank's queries is n tokens: the mask is a shifted one per block.
        ranks = jnp.arange(n, dtype=jnp.int32)
        return local.arrived(None, query, gathered[:, :, :, None], ranks, jnp.zeros_like(ranks))
    kv = jnp.moveaxis(gathered, 0, 2)
    kv = kv.reshape(*kv.shape[:2], -1, *kv.shape[4:])
    key, value = unplace(kv, layout.placement, n, axis=2)
    if not local.is_causal:
        return local.attend(query, key, value, key_value_seq_lengths=local.lengths)
    parts: list[Part] = []
    size, lengths = layout.chunk_tokens, local.lengths
    for chunk in range(layout.chunks):
        start = layout.chunk_number(local.rank, chunk) * size
        rows = query[:, chunk * size : (chunk + 1) * size]
        own = (lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in (key, value))
        held = None if lengths is None else jnp.clip(lengths - start, 0, size)
        inside = local.attend(rows, *own, is_causal=True, key_value_seq_lengths=held)
        before = jnp.broadcast_to(start, query.shape[:1]).astype(jnp.int32)
        seen = before if lengths is None else jnp.minimum(before, lengths)
        earlier = local.attend(rows, key, value, key_value_seq_lengths=seen)
        parts.append(merge_attention([earlier, inside]))
    out, lse = (jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True))
    return out, lse
