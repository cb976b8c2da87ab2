"""Schedules in which pieces go round fixed rings, and the plain ring itself."""

import numpy as np
import numpy.typing as npt

from jaxinfer.sharding.checks import at_least
from jaxinfer.sharding.schedule import Schedule


def from_cycles(name: str, cycles: npt.NDArray[np.integer]) -> Schedule:
    """Send one piece of every rank round each of several Hamiltonian cycles.

    Piece r·m + j is owned by rank r and travels in lane j along cycle j.

    Args:
        name: Kind of schedule.
        cycles: [m, n] ranks in the order in which cycle j visits them.

    Returns:
        A schedule of n - 1 steps and m lanes. If the cycles share no arc, no link carries two
        pieces in one step.
    """
    lanes, n = cycles.shape
    lane = np.arange(lanes)[:, None]
    following = np.empty((lanes, n), np.int32)
    following[lane, cycles] = np.roll(cycles, -1, axis=1)
    piece = np.empty((max(n - 1, 0), n, lanes), np.int32)
    for step in range(n - 1):
        # What started `step` places earlier on the cycle has arrived here.
        piece[step][cycles, lane] = np.roll(cycles, step, axis=1) * lanes + lane
    return Schedule(
        name=name,
        num_ranks=n,
        pieces_per_rank=lanes,
        owner=np.repeat(np.arange(n, dtype=np.int32), lanes),
        destination=np.broadcast_to(following.T, (max(n - 1, 0), n, lanes)),
        piece=piece,
    )


def ring(num_ranks: int) -> Schedule:
    """Send the whole block to the next rank, n - 1 times (ring attention, arXiv 2310.01889).

    Args:
        num_ranks: n, at least 1; one rank has nothing to send.

    Returns:
        A schedule that uses n of the n(n - 1) directed links.

    Raises:
        ValueError: If `num_ranks` is below 1.

    Example:
        >>> ring(3).destination[:, :, 0].tolist()
        [[1, 2, 0], [1, 2, 0]]
    """
    num_ranks = at_least("num_ranks", num_ranks, 1)
    return from_cycles("ring", np.arange(num_ranks)[None, :])
