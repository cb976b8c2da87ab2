"""Hamiltonian decomposition of the complete directed graph: n - 1 rings that share no link.

The idea of TASP (arXiv 2509.26541): cut each block into n - 1 pieces and send piece j round
cycle j, so that every directed link carries one piece in every step. By Tillson's theorem
(J. Combin. Theory B 29, 1980) the decomposition exists for every n except 4 and 6.
"""

import numpy as np
import numpy.typing as npt

from jaxinfer.sharding.checks import at_least
from jaxinfer.sharding.hamilton_even import even_cycles
from jaxinfer.sharding.ring import from_cycles
from jaxinfer.sharding.schedule import Schedule
from jaxinfer.sharding.zigzag import zigzag


def has_decomposition(num_ranks: int) -> bool:
    """Whether the complete directed graph on n ranks splits into n - 1 Hamiltonian cycles."""
    return num_ranks >= 2 and num_ranks not in (4, 6)


def hamiltonian_cycles(num_ranks: int) -> npt.NDArray[np.int32]:
    """Split the complete directed graph into Hamiltonian cycles.

    Args:
        num_ranks: n: 2, 3, 5 or from 7 up.

    Returns:
        [n - 1, n] ranks in visiting order; each of the n(n - 1) arcs is in exactly one row.

    Raises:
        ValueError: If n is below 2, or 4 or 6, which have no decomposition.

    Example:
        >>> hamiltonian_cycles(5).tolist()
        [[4, 0, 1, 3, 2], [4, 1, 2, 0, 3], [4, 2, 3, 1, 0], [4, 3, 0, 2, 1]]
    """
    n = at_least("num_ranks", num_ranks, 2, " for a ring")
    if not has_decomposition(n):
        raise ValueError(
            f"num_ranks={n} has no decomposition into Hamiltonian cycles (only 4 and 6 have "
            f"none); use schedule 'full_link'" + (" or 'xor'" if n == 4 else "")
        )
    if n == 2:
        return np.array([[0, 1]], np.int32)
    return odd_cycles(n) if n % 2 else even_cycles(n)


def odd_cycles(num_ranks: int) -> npt.NDArray[np.int32]:
    """Walecki's zigzags for odd n, each read as a directed cycle of its own.

    Row i is the last rank followed by 0, 1, -1, 2, -2, … shifted by i modulo n - 1. Neighbours
    in the zigzag differ by each nonzero residue once, so the shifts use each arc once.
    """
    w = num_ranks - 1
    rows = (zigzag(w)[None, :] + np.arange(w)[:, None]) % w
    return np.concatenate([np.full((w, 1), w), rows], axis=1).astype(np.int32)


def hamilton(num_ranks: int) -> Schedule:
    """Send piece j of every rank round Hamiltonian cycle j.

    Args:
        num_ranks: n: 2, 3, 5 or from 7 up.

    Returns:
        A schedule of n - 1 steps and n - 1 lanes that uses every directed link in every step.

    Raises:
        ValueError: As `hamiltonian_cycles`.

    Example:
        >>> schedule = hamilton(8)
        >>> schedule.validate()
        >>> schedule.num_steps, schedule.num_lanes, schedule.link_share
        (7, 7, 1.0)
    """
    return from_cycles("hamilton", hamiltonian_cycles(num_ranks))
