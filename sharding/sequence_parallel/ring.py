"""`ring_attention`: attention over a sequence that is sharded over a mesh axis."""

import functools
from typing import Any, Literal, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxinfer.pallas_kernels.dispatch import Implementation
from jaxinfer.sharding.cost import Workload
from jaxinfer.sharding.schedule import Schedule
from jaxinfer.sharding.sequence_parallel.arguments import check_arrays, per_row
from jaxinfer.sharding.sequence_parallel.exchange import EXCHANGES, Axis, origins
from jaxinfer.sharding.sequence_parallel.heads_gather import gather_heads
from jaxinfer.sharding.sequence_parallel.layout import Layout
from jaxinfer.sharding.sequence_parallel.placement import Placement, chunks_per_rank
from jaxinfer.sharding.sequence_parallel.plan import Plan, Transport, plan
from jaxinfer.sharding.sequence_parallel.step import Local, Part
from jaxinfer.sharding.sequence_parallel.stripes import window_before
from jaxinfer.sharding.topology import Topology, h200_nvswitch

# On two H200, a second call and its merge took 94 µs more than one call over all keys for
# 4096·32·128 elements, and 526 for four times as many: 5.6 and 7.8 ps each.
_PART_S_PER_ELEMENT = 6.5e-12


class RingOptions(TypedDict, total=False):
    """Keyword arguments of attention over a sharded sequence, for type checkers."""

    schedule: Schedule | str | None
    placement: Placement
    is_causal: bool
    scale: float | None
    lengths: Array | int | None
    transport: Transport | None
    topology: Topology | None
    implementation: Implementation


class _MaskedRingOptions(RingOptions, total=False):
    """Those that `ring_attention` has besides."""

    local_window_size: int | tuple[int, int] | None
    logits_softcap: float | None


@overload
def ring_attention(
    query: Array, key: Array, value: Array, *, axis_name: Axis,
    return_residual: Literal[False] = False, **options: Unpack[_MaskedRingOptions],
) -> Array: ...  # fmt: skip
@overload
def ring_attention(
    query: Array, key: Array, value: Array, *, axis_name: Axis,
    return_residual: Literal[True], **options: Unpack[_MaskedRingOptions],
) -> tuple[Array, Array]: ...  # fmt: skip
def ring_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    *,
    axis_name: Axis,
    schedule: Schedule | str | None = None,
    placement: Placement = "contiguous",
    is_causal: bool = True,
    scale: float | None = None,
    lengths: Int[Array, "B"] | Int[Array, ""] | int | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    logits_softcap: float | None = None,
    transport: Transport | None = None,
    topology: Topology | None = None,
    implementation: Implementation = None,
    return_residual: bool = False,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attend from a rank's tokens to those of all ranks; call it inside `jax.shard_map`.

    Queries stay, keys and values travel as a schedule says (ring attention, arXiv 2310.01889;
    several rings at once: TASP, arXiv 2509.26541). Exchange t + 1 is issued before attention t,
    and depends on nothing that it computes.

    Args:
        query: `[B, T, N, H]`, T the tokens of one rank; float32, bfloat16 or float16.
        key: `[B, T, K, H]`, K divides N.
        value: As `key`.
        axis_name: Mesh axis, or several that count as one, of n ranks.
        schedule: A `Schedule` for n ranks, the name of a kind, or None for the one with the
            least modelled time whose pieces fit T. T must be a multiple of its pieces per rank,
            and of twice that in zigzag; the ring has one piece.
        placement: Which tokens a rank holds: `"contiguous"`, `"zigzag"` or `"striped"`; see
            `place`. Causal work is even in the latter two.
        is_causal: Hide keys after the query's position in the whole sequence.
        scale: Factor on q·k; default 1/sqrt(H).
        lengths: Tokens of the whole sequence that are none of the padding at its end: an int, a
            scalar, or `[B]` int32, the same on all ranks; None: all. Padding may hold anything.
        local_window_size: Keys visible before a query's position, as in `attention`; needs
            a causal mask and striped placement, where every rank's part of a window is one too.
        logits_softcap: Logits become c·tanh(logits / c).
        transport: `"ppermute"` (a collective permute per lane), `"all_to_all"` (a grouped
            exchange per step), `"all_gather"` (groups of KV heads; schedule `all_gather`, whose
            pieces divide K), `"collective_group"` (a group of permutes per
            step; JAX 0.12 on GPUs), or None for the least modelled time of the first three.
        topology: Links for the model; default `h200_nvswitch(n)`.
        implementation: Of the local attention, as in `attention`.
        return_residual: Also return the log-sum-exp of the logits.

    Returns:
        `[B, T, N, H]` in the query's dtype, zeros past `lengths`; with `return_residual` also
        `[B, T, N]` float32, natural-log log-sum-exp, -inf past `lengths`.

    Raises:
        ValueError: shapes, schedule, placement and transport that do not fit together.
        TypeError: dtypes that differ, or lengths that are no integers.
        NotSupported: the implementation asked for by name cannot serve the call, or
            `collective_group` is not to be had.

    Numerics: outputs of steps come in the query's dtype and are merged in float32.

    Memory: two blocks of keys and values beside the own one; with transport `all_gather` in m
    pieces twice the keys and values of all ranks, by m.

    Inside `jax.shard_map` pass `check_vma=False`: blocked local attention does not declare which
    of its values differ between ranks.
    """
    n = lax.axis_size(axis_name)
    B, T, N, H = check_arrays(query, key, value, scale)
    left = window_before(local_window_size)
    if left is not None and (placement != "striped" or not is_causal):
        raise ValueError(
            "local_window_size needs striped placement and a causal mask; got "
            f"placement={placement!r}, is_causal={is_causal}"
        )
    chosen = plan_for(
        n, (B, T, N, H), key.shape[2], query.dtype.itemsize, schedule=schedule,
        transport=transport, topology=topology, placement=placement, is_causal=is_causal,
    )  # fmt: skip
    by_heads = chosen.transport == "all_gather"
    merged = is_causal if by_heads else n > 1
    local = Local(
        layout=Layout(
            placement=placement, num_ranks=n, tokens_per_rank=T,
            pieces=1 if by_heads else chosen.schedule.pieces_per_rank,
        ),
        rank=lax.axis_index(axis_name), is_causal=is_causal, lengths=per_row(lengths, B),
        residual=return_residual or merged, left=left,
        options={
            "scale": scale, "logits_softcap": logits_softcap, "implementation": implementation,
        },
    )  # fmt: skip
    run = gather_heads if by_heads else _follow
    extra: dict[str, Any] = {} if by_heads else {"transport": chosen.transport}
    out, lse = run(local, chosen.schedule, query, key, value, axis_name, **extra)
    real = local.own_lengths()
    if real is not None:
        row = jnp.arange(T)[None, :, None] < real[:, None, None]
        out, lse = jnp.where(row[..., None], out, 0), jnp.where(row, lse, -jnp.inf)
    out = out.astype(query.dtype)
    return (out, lse) if return_residual else out


def _follow(
    local: Local,
    schedule: Schedule,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    axis_name: Axis,
    *,
    transport: str,
) -> Part:
    """Attend over the own block, then over what each step of the schedule brings."""
    exchange = functools.partial(EXCHANGES[transport], schedule)
    owner, number = (jnp.asarray(table)[:, local.rank] for table in origins(schedule))
    own = local.layout.cut(key, value)
    arriving = exchange(0, own, None, axis_name) if schedule.num_steps else None
    state = local.own(query, key, value)
    for step in range(schedule.num_steps):
        pieces, arriving = arriving, None
        assert pieces is not None
        if step + 1 < schedule.num_steps:
            arriving = exchange(step + 1, own, pieces, axis_name)
        state = local.arrived(state, query, pieces, owner[step], number[step])
    return state


def plan_for(
    num_ranks: int,
    shape: tuple[int, int, int, int],
    num_kv_heads: int,
    itemsize: int,
    *,
    schedule: Schedule | str | None,
    transport: Transport | None,
    topology: Topology | None,
    placement: Placement,
    is_causal: bool,
    any_length: bool = False,
) -> Plan:
    """The plan of a call whose local queries have `shape` `[B, T, N, H]`.

    Args:
        num_ranks: n.
        shape: B, T, N, H.
        num_kv_heads: K.
        itemsize: Bytes of an element.
        schedule: As in `ring_attention`.
        transport: As in `ring_attention`.
        topology: As in `ring_attention`.
        placement: As in `ring_attention`.
        is_causal: As in `ring_attention`.
        any_length: Whether T may still be padded, so that the pieces of any schedule fit.
    """
    B, T, N, H = shape
    workload = Workload(
        tokens_per_rank=T, num_heads=N, num_kv_heads=num_kv_heads, head_dim=H, batch=B,
        bytes_per_element=itemsize, part_s_per_element=_PART_S_PER_ELEMENT,
        # The slowest rank counts: in contiguous placement the last one has the whole mask.
        causal=is_causal and placement != "contiguous",
    )  # fmt: skip
    return plan(
        h200_nvswitch(num_ranks) if topology is None else topology,
        workload,
        schedule=schedule,
        transport=transport,
        chunks=None if any_length else chunks_per_rank(placement),
        masks_differ=is_causal and placement == "striped",
    )
