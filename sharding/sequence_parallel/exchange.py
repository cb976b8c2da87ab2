"""One step of a schedule on devices: pieces leave, pieces arrive.

Three transports move the same pieces. `ppermute` sends each lane by a collective permute of its
own; XLA runs the permutes of a step one after another, so this is for schedules of one lane, and to
be read. `all_to_all` sends all lanes of a step in one grouped exchange, over all links at once;
links that the schedule leaves idle carry a piece that nobody reads. `collective_group` makes one
NCCL group of the permutes of a step: all at once, and nothing else.
"""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.pallas_kernels.device import current_device
from jaxinfer.pallas_kernels.dispatch import NotSupported
from jaxinfer.sharding.schedule import IntArray, Schedule

Axis = str | tuple[str, ...]


def exchange_ppermute(
    schedule: Schedule, step: int, own: jax.Array, current: jax.Array | None, axis_name: Axis
) -> jax.Array:
    """Do one step with a collective permute for each lane.

    Args:
        schedule: n ranks, m pieces per rank, any number of lanes.
        step: t.
        own: `[m, ...]` the rank's own pieces.
        current: `[lanes, ...]` what the step before brought; None at step 0.
        axis_name: Mesh axis of n ranks, inside `jax.shard_map`.

    Returns:
        `[lanes, ...]` the pieces `schedule.arrivals()[step]`.
    """
    held, slot = _held(own, current, sources(schedule)[step], schedule.pieces_per_rank)
    lanes = []
    for lane in range(schedule.num_lanes):
        sent = _take(held, slot[:, lane], axis_name)
        pairs = list(enumerate(schedule.destination[step, :, lane].tolist()))
        lanes.append(lax.ppermute(sent, axis_name, pairs))
    return jnp.stack(lanes)


def exchange_all_to_all(
    schedule: Schedule, step: int, own: jax.Array, current: jax.Array | None, axis_name: Axis
) -> jax.Array:
    """Do one step with one `all_to_all`; arguments and result as in `exchange_ppermute`."""
    held, slot = _held(own, current, sources(schedule)[step], schedule.pieces_per_rank)
    n, lanes = schedule.num_ranks, schedule.num_lanes
    to = schedule.destination[step]
    # Row d goes to rank d. Rows without a piece (the rank itself, idle links) send slot 0.
    rows = np.zeros((n, n), np.int32)
    np.put_along_axis(rows, to, slot, axis=1)
    sender = np.empty((n, lanes), np.int32)
    np.put_along_axis(sender, to, np.broadcast_to(np.arange(n, dtype=np.int32)[:, None], to.shape),
                      axis=0)  # fmt: skip
    rank = lax.axis_index(axis_name)
    sent = held[jnp.asarray(rows)[rank]]
    received = lax.all_to_all(sent, axis_name, split_axis=0, concat_axis=0)
    return received[jnp.asarray(sender)[rank]]


def exchange_collective_group(
    schedule: Schedule, step: int, own: jax.Array, current: jax.Array | None, axis_name: Axis
) -> jax.Array:
    """Do one step with one group of permutes; arguments and result as in `exchange_ppermute`.

    The group runs where it stands in the program, on the stream that computes: attention that
    could run beside it comes after it.

    Raises:
        NotSupported: a JAX without `jax.experimental.thunky`, or no NVIDIA GPU.
    """
    thunky = _thunky()
    held, slot = _held(own, current, sources(schedule)[step], schedule.pieces_per_rank)
    sent = jnp.stack([_take(held, slot[:, lane], axis_name) for lane in range(slot.shape[1])])
    arrived = jax.new_ref(lax.empty(sent.shape, sent.dtype))

    def permutes(source: Any, target: Any) -> None:
        for lane, to in enumerate(schedule.destination[step].T.tolist()):
            here = slice(lane, lane + 1)
            thunky.collective_permute(
                source.at[here], target.at[here], axis_name, list(enumerate(to))
            )

    @thunky.jit
    def group(source: Any, target: Any) -> None:
        thunky.collective_group(lambda: permutes(source, target))

    group(sent, arrived)
    return arrived[...]


def _thunky() -> Any:
    """The module of JAX that has groups of collectives; it is experimental."""
    refuse = functools.partial(NotSupported, "ring_attention", "collective_group")
    try:
        thunky = importlib.import_module("jax.experimental.thunky")
    except ImportError:
        raise refuse(f"JAX {jax.__version__}", "JAX 0.12 (jax.experimental.thunky)") from None
    device = current_device()
    if device.platform != "gpu":
        raise refuse(f"device {device.name!r}", "NVIDIA GPUs")
    return thunky


EXCHANGES = {
    "ppermute": exchange_ppermute,
    "all_to_all": exchange_all_to_all,
    "collective_group": exchange_collective_group,
}


@functools.lru_cache(maxsize=64)
def sources(schedule: Schedule) -> IntArray:
    """Where rank r finds what it sends in lane a at step t.

    Returns:
        `[steps, n, lanes]` slots: below m the rank's own piece, from m on the lane (less m) in
        which the step before brought the piece.
    """
    m, lanes = schedule.pieces_per_rank, np.arange(schedule.num_lanes, dtype=np.int32)
    arrived, slot = schedule.arrivals(), _numbers(schedule)[schedule.piece]
    lane = np.zeros((schedule.num_ranks, schedule.num_pieces), np.int32)
    for step in range(1, schedule.num_steps):
        np.put_along_axis(lane, arrived[step - 1].astype(np.int64), lanes[None], axis=1)
        piece = schedule.piece[step]
        passed_on = schedule.owner[piece] != np.arange(schedule.num_ranks)[:, None]
        at = np.take_along_axis(lane, piece.astype(np.int64), axis=1)
        slot[step] = np.where(passed_on, m + at, slot[step])
    return slot


@functools.lru_cache(maxsize=64)
def origins(schedule: Schedule) -> tuple[IntArray, IntArray]:
    """`[steps, n, lanes]` owner of each arriving piece, and its number among the owner's pieces."""
    arrived = schedule.arrivals()
    return schedule.owner[arrived], _numbers(schedule)[arrived]


def _numbers(schedule: Schedule) -> IntArray:
    """`[n·m]` number of each piece among its owner's."""
    number = np.empty(schedule.num_pieces, np.int32)
    number[schedule.own_pieces()] = np.arange(schedule.pieces_per_rank, dtype=np.int32)
    return number


def _held(
    own: jax.Array, current: jax.Array | None, slot: IntArray, num_own: int
) -> tuple[jax.Array, IntArray]:
    """The buffer that a step sends from, and slots within it; both are joined only if both send."""
    if current is None or (slot < num_own).all():
        return own, slot
    if (slot >= num_own).all():
        return current, slot - num_own
    return jnp.concatenate([own, current]), slot


def _take(held: jax.Array, slot: IntArray, axis_name: Axis) -> jax.Array:
    """Slot `slot[rank]` of a buffer; without a gather where all ranks send the same slot."""
    if (slot == slot[0]).all():
        return held[int(slot[0])]
    return held[jnp.asarray(slot)[lax.axis_index(axis_name)]]
