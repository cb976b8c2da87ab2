"""Schedules that use every directed link in every step, also for 4 and 6 ranks.

Four and six ranks have no n - 1 fixed rings without a common link. Rings that change from step to
step do exist: take n walks over all n vertices of Z_(n-1) and one fixed vertex, such that at
every step the n walks make n moves of different kinds (a difference, into the fixed vertex, out
of it), and shift each walk by all residues. Each kind of move covers n - 1 links, so together
they cover all n(n - 1) once.
"""

import numpy as np
import numpy.typing as npt

from jaxinfer.sharding.checks import at_least
from jaxinfer.sharding.hamilton import hamiltonian_cycles, has_decomposition
from jaxinfer.sharding.ring import from_cycles
from jaxinfer.sharding.schedule import Schedule

# Walks over the residues modulo n - 1; n - 1 itself is the fixed vertex.
BASE_WALKS = {
    4: ((0, 1, 2, 3), (0, 2, 3, 1), (0, 3, 1, 2), (3, 0, 2, 1)),
    6: (
        (0, 1, 2, 3, 4, 5), (0, 2, 1, 3, 5, 4), (0, 3, 1, 5, 2, 4),
        (0, 4, 5, 3, 2, 1), (5, 0, 2, 1, 3, 4), (0, 5, 3, 1, 4, 2),
    ),
}  # fmt: skip


def full_link(num_ranks: int) -> Schedule:
    """Use every directed link in every step, for any number of ranks from 2 up.

    Args:
        num_ranks: n.

    Returns:
        A schedule of n - 1 steps and n - 1 lanes: the Hamiltonian rings where they exist, walks
        that change their links from step to step for n = 4 and 6.

    Raises:
        ValueError: If `num_ranks` is below 2.

    Example:
        >>> schedule = full_link(6)
        >>> schedule.validate()
        >>> schedule.link_share, schedule.keeps_lanes
        (1.0, False)
    """
    n = at_least("num_ranks", num_ranks, 2, " for a ring")
    if has_decomposition(n):
        return from_cycles("full_link", hamiltonian_cycles(n))
    return from_routes("full_link", _shifted(np.array(BASE_WALKS[n], np.int32)))


def _shifted(walks: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Shift walks [n, n] by every residue modulo n - 1, giving [n(n - 1), n]."""
    w = walks.shape[1] - 1
    shifted = [np.where(walks == w, w, (walks + i) % w) for i in range(w)]
    return np.concatenate(shifted).astype(np.int32)


def from_routes(name: str, routes: npt.NDArray[np.int32]) -> Schedule:
    """Build a schedule from the route of every piece, for schedules that use all links.

    Args:
        name: Kind of schedule.
        routes: [n(n - 1), n] ranks in the order in which a piece visits them, its owner first;
            every directed link is used by exactly one piece at every step.

    Returns:
        A schedule whose lane d - 1 sends from rank r to rank r + d modulo n.
    """
    pieces, n = routes.shape
    order = np.argsort(routes[:, 0], kind="stable")
    routes = routes[order]
    ranks = np.arange(n)[:, None]
    destination = (ranks + np.arange(1, n)) % n
    piece = np.empty((n - 1, n, n - 1), np.int32)
    for step in range(n - 1):
        source, target = routes[:, step], routes[:, step + 1]
        piece[step, source, (target - source) % n - 1] = np.arange(pieces)
    return Schedule(
        name=name,
        num_ranks=n,
        pieces_per_rank=n - 1,
        owner=routes[:, 0],
        destination=np.broadcast_to(destination.astype(np.int32), piece.shape),
        piece=piece,
    )
