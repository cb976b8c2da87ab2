"""`ulysses_attention`: ranks exchange heads for tokens before attention, and back after it."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxinfer.pallas_kernels import attention
from jaxinfer.pallas_kernels.dispatch import Implementation
from jaxinfer.sharding.sequence_parallel.arguments import check_arrays, per_row
from jaxinfer.sharding.sequence_parallel.exchange import Axis
from jaxinfer.sharding.sequence_parallel.ring import ring_attention


def ulysses_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    *,
    axis_name: Axis,
    ring_axis: Axis | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    lengths: Int[Array, "B"] | Int[Array, ""] | int | None = None,
    implementation: Implementation = None,
    return_residual: bool = False,
    **ring_options: Any,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attend with all tokens of some heads on each rank; call it inside `jax.shard_map`.

    An all-to-all turns T tokens of all heads into n·T tokens of N/n heads (DeepSpeed-Ulysses,
    arXiv 2309.14509). With `ring_axis` these are in turn one rank's share of a longer sequence,
    over which `ring_attention` attends (USP, arXiv 2405.07719): the tokens are then sharded over
    `(ring_axis, axis_name)`, in that order, and placed for `ring_axis`.

    Heads that n does not divide are no obstacle: KV heads are replicated, each for a part of its
    query heads, or heads of zeros are added, whichever leaves a rank fewer query heads.

    Args:
        query: `[B, T, N, H]`, T the tokens of one rank; float32, bfloat16 or float16.
        key: `[B, T, K, H]`, K divides N.
        value: As `key`.
        axis_name: Mesh axis of n ranks that share the heads. Placement is contiguous.
        ring_axis: A second mesh axis that shares the sequence, or None.
        is_causal: Hide keys after the query's position in the whole sequence.
        scale: Factor on q·k; default 1/sqrt(H).
        lengths: As in `ring_attention`.
        implementation: Of the local attention, as in `attention`.
        return_residual: Also return the log-sum-exp of the logits.
        **ring_options: `schedule`, `placement`, `transport` and `topology` of `ring_attention`.

    Returns:
        As `ring_attention`.

    Raises:
        ValueError: shapes that do not fit together, or options of a ring without `ring_axis`.
        TypeError: dtypes that differ, lengths that are no integers, or an unknown argument.
        NotSupported: the implementation asked for by name cannot serve the call.

    Memory: `B·T·(N + 2·K)·H` elements besides the arguments; more where heads are replicated.
    """
    check_arrays(query, key, value, scale)
    if ring_axis is None and ring_options:
        raise ValueError(f"{', '.join(ring_options)} need ring_axis; got ring_axis=None")
    n = lax.axis_size(axis_name)
    N, K = query.shape[2], key.shape[2]
    replicas, kv_heads = share_heads(N, K, n)
    kv = jnp.repeat(jnp.stack([key, value]), replicas, axis=3)
    kv = _pad_heads(kv, kv_heads, axis=3)
    wide = _pad_heads(query, kv_heads * (N // K // replicas), axis=2)
    wide = lax.all_to_all(wide, axis_name, split_axis=2, concat_axis=1, tiled=True)
    key, value = lax.all_to_all(kv, axis_name, split_axis=3, concat_axis=2, tiled=True)
    options: dict[str, Any] = {
        "is_causal": is_causal, "scale": scale, "implementation": implementation,
        "return_residual": return_residual,
    }  # fmt: skip
    if ring_axis is None:
        tokens = per_row(lengths, query.shape[0])
        result = attention(
            wide, key, value, query_seq_lengths=tokens, key_value_seq_lengths=tokens, **options
        )
    else:
        result = ring_attention(
            wide, key, value, axis_name=ring_axis, lengths=lengths, **options, **ring_options
        )

    def back(x: jax.Array) -> jax.Array:
        return lax.all_to_all(x, axis_name, split_axis=1, concat_axis=2, tiled=True)[:, :, :N]

    return jax.tree.map(back, result)


def share_heads(num_heads: int, num_kv_heads: int, num_ranks: int) -> tuple[int, int]:
    """How often to repeat each KV head, and how many KV heads there are then, zeros included.

    Args:
        num_heads: N.
        num_kv_heads: K; divides N.
        num_ranks: n.

    Returns:
        Replicas r, which divides N/K, and KV heads, a multiple of n. Each rank has the fewest
        query heads that any r allows, and the smallest such r is taken.

    Example:
        >>> share_heads(9, 3, 3), share_heads(9, 3, 2), share_heads(8, 1, 4)
        ((1, 3), (3, 10), (4, 4))
    """
    group = num_heads // num_kv_heads

    def heads_per_rank(replicas: int) -> int:
        return -(-num_kv_heads * replicas // num_ranks) * (group // replicas)

    best = min((r for r in range(1, group + 1) if group % r == 0), key=heads_per_rank)
    return best, -(-num_kv_heads * best // num_ranks) * num_ranks


def _pad_heads(x: jax.Array, heads: int, *, axis: int) -> jax.Array:
    missing = [(0, 0)] * x.ndim
    missing[axis] = (0, heads - x.shape[axis])
    return jnp.pad(x, missing)
