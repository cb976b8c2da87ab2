"""`sequence_parallel_attention`: whole sequences in, whole sequences out."""

import functools
import math
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxinfer.pallas_kernels.dispatch import Implementation
from jaxinfer.sharding.schedule import Schedule
from jaxinfer.sharding.sequence_parallel.arguments import check_arrays, per_row
from jaxinfer.sharding.sequence_parallel.placement import (
    Placement,
    chunks_per_rank,
    place,
    unplace,
)
from jaxinfer.sharding.sequence_parallel.plan import Transport
from jaxinfer.sharding.sequence_parallel.ring import RingOptions, plan_for, ring_attention
from jaxinfer.sharding.sequence_parallel.ulysses import share_heads, ulysses_attention
from jaxinfer.sharding.topology import Topology


@overload
def sequence_parallel_attention(
    mesh: Mesh, axis: str, query: Array, key: Array, value: Array,
    *, ulysses_axis: str | None = None, return_residual: Literal[False] = False,
    **options: Unpack[RingOptions],
) -> Array: ...  # fmt: skip
@overload
def sequence_parallel_attention(
    mesh: Mesh, axis: str, query: Array, key: Array, value: Array,
    *, ulysses_axis: str | None = None, return_residual: Literal[True],
    **options: Unpack[RingOptions],
) -> tuple[Array, Array]: ...  # fmt: skip
def sequence_parallel_attention(
    mesh: Mesh,
    axis: str,
    query: Float[Array, "B S N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    ulysses_axis: str | None = None,
    schedule: Schedule | str | None = None,
    placement: Placement | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    lengths: Int[Array, "B"] | Int[Array, ""] | int | None = None,
    transport: Transport | None = None,
    topology: Topology | None = None,
    implementation: Implementation = None,
    return_residual: bool = False,
) -> Float[Array, "B S N H"] | tuple[Float[Array, "B S N H"], Float[Array, "B S N"]]:
    """Attend over sequences of any length that a mesh axis shares.

    Pads and places the tokens, runs `ring_attention` in a `jax.shard_map` over the mesh, and puts
    the result back in order. A model keeps its tokens placed from the embedding to the last layer
    instead, and calls `ring_attention` itself.

    Args:
        mesh: Devices; axes that are not named here compute the same.
        axis: Mesh axis of n ranks that shares the sequence.
        query: `[B, S, N, H]`; float32, bfloat16 or float16.
        key: `[B, S, K, H]`, K divides N.
        value: As `key`.
        ulysses_axis: A second axis, which shares the heads (`ulysses_attention`), or None.
        schedule: As in `ring_attention`; None chooses among all, because any length can be padded.
        placement: As in `ring_attention`; default zigzag with a causal mask, else contiguous.
        is_causal: Hide keys after the query's position.
        scale: Factor on q·k; default 1/sqrt(H).
        lengths: Tokens of each row, as in `ring_attention`; None: all S.
        transport: As in `ring_attention`.
        topology: As in `ring_attention`.
        implementation: Of the local attention, as in `attention`.
        return_residual: Also return the log-sum-exp of the logits.

    Returns:
        `[B, S, N, H]` in the query's dtype; with `return_residual` also `[B, S, N]` float32.

    Raises:
        ValueError: an axis that the mesh lacks; otherwise as `ring_attention`.
        TypeError: dtypes that differ, or lengths that are no integers.
        NotSupported: the implementation asked for by name cannot serve the call.

    A new S, or a new `Schedule` object, compiles anew.

    Example:
        >>> mesh = jax.make_mesh((jax.device_count(),), ("seq",))
        >>> x = jnp.ones((1, 13, 2, 8))
        >>> sequence_parallel_attention(mesh, "seq", x, x, x).shape
        (1, 13, 2, 8)
    """
    shape = check_arrays(query, key, value, scale)
    for name in (axis,) if ulysses_axis is None else (axis, ulysses_axis):
        if name not in mesh.shape:
            raise ValueError(f"mesh has axes {', '.join(map(str, mesh.shape))}; got {name!r}")
    if axis == ulysses_axis:
        raise ValueError(f"axis and ulysses_axis must differ; got {axis!r} twice")
    if placement is None:
        placement = "zigzag" if is_causal else "contiguous"
    if isinstance(implementation, list):
        implementation = tuple(implementation)
    return _whole(
        query, key, value, per_row(lengths, shape[0]),
        mesh=mesh, axis=axis, ulysses_axis=ulysses_axis, schedule=schedule, placement=placement,
        is_causal=is_causal, scale=scale, transport=transport, topology=topology,
        implementation=implementation, return_residual=return_residual,
    )  # fmt: skip


@functools.partial(
    jax.jit,
    static_argnames=(
        "mesh", "axis", "ulysses_axis", "schedule", "placement", "is_causal", "scale", "transport",
        "topology", "implementation", "return_residual",
    ),
)  # fmt: skip
def _whole(
    query, key, value, lengths, *, mesh: Mesh, axis: str, ulysses_axis: str | None,
    schedule: Schedule | str | None, placement: Placement, is_causal: bool, scale: float | None,
    transport: Transport | None, topology: Topology | None, implementation: Any,
    return_residual: bool,
):  # fmt: skip
    B, S, N, H = query.shape
    n, share = mesh.shape[axis], 1 if ulysses_axis is None else mesh.shape[ulysses_axis]
    K, tokens = key.shape[2], -(-S // n)
    if share > 1:
        replicas, kv_heads = share_heads(N, K, share)
        N, K = kv_heads * (N // K // replicas) // share, kv_heads // share
    chosen = plan_for(
        n, (B, tokens, N, H), K, query.dtype.itemsize, schedule=schedule, transport=transport,
        topology=topology, placement=placement, is_causal=is_causal, any_length=True,
    )  # fmt: skip
    pieces = 1 if chosen.transport == "all_gather" else chosen.schedule.pieces_per_rank
    # A rank's tokens are also shared by the ranks that share its heads.
    multiple = n * math.lcm(chunks_per_rank(placement) * pieces, share)
    padded = -(-S // multiple) * multiple
    if padded > S and lengths is None and not is_causal:
        # Under a causal mask the padding comes after every token that counts.
        lengths = jnp.full((B,), S, jnp.int32)

    options: dict[str, Any] = {
        "schedule": chosen.schedule, "transport": chosen.transport, "placement": placement,
        "is_causal": is_causal, "scale": scale, "implementation": implementation,
        "return_residual": return_residual,
    }  # fmt: skip
    spec = P(None, axis if ulysses_axis is None else (axis, ulysses_axis))

    def local(query, key, value, lengths):
        if ulysses_axis is None:
            return ring_attention(query, key, value, axis_name=axis, lengths=lengths, **options)
        return ulysses_attention(
            query, key, value, axis_name=ulysses_axis, ring_axis=axis, lengths=lengths, **options
        )

    def arrange(x: jax.Array) -> jax.Array:
        missing = [(0, 0), (0, padded - S)] + [(0, 0)] * (x.ndim - 2)
        return place(jnp.pad(x, missing), placement, n)

    def attend(query, key, value, lengths):
        call = jax.shard_map(
            local, mesh=inner, in_specs=(spec, spec, spec, P()), out_specs=spec, check_vma=False
        )
        result = call(arrange(query), arrange(key), arrange(value), lengths)
        return jax.tree.map(lambda x: unplace(x, placement, n)[:, :S], result)

    # Where axes are Explicit, operands would have to be sharded as `spec` says already.
    context = jax.sharding.get_abstract_mesh()
    if context.explicit_axes:
        inner = None  # the context's, which auto_axes makes Auto
        run: Any = jax.sharding.auto_axes(attend, axes=context.axis_names, out_sharding=P())
    else:
        inner, run = Mesh(mesh.devices, mesh.axis_names), attend
    return run(query, key, value, lengths)
