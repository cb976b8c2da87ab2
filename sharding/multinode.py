"""Rings over several nodes: all links inside a node, one link per network card between nodes."""

import numpy as np
import numpy.typing as npt

from jaxinfer.sharding.checks import at_least
from jaxinfer.sharding.hamilton import hamiltonian_cycles, has_decomposition
from jaxinfer.sharding.ring import from_cycles
from jaxinfer.sharding.schedule import Schedule


def hamiltonian_paths(num_ranks: int) -> npt.NDArray[np.int32]:
    """Split the complete directed graph on g ranks into g Hamiltonian paths.

    They are the cycles of the graph on g + 1 ranks without the last rank, so every rank is the
    start of exactly one path and the end of exactly one.

    Args:
        num_ranks: g; not 3 or 5, because 4 and 6 have no cycles.

    Returns:
        [g, g] ranks in visiting order.

    Raises:
        ValueError: If `num_ranks` is below 1, or 3 or 5.

    Example:
        >>> hamiltonian_paths(4).tolist()
        [[0, 1, 3, 2], [1, 2, 0, 3], [2, 3, 1, 0], [3, 0, 2, 1]]
    """
    g = at_least("ranks_per_node", num_ranks, 1)
    if not has_decomposition(g + 1):
        raise ValueError(
            f"ranks_per_node={g} has no decomposition into paths (only 3 and 5 have none); use "
            f"schedule 'hamilton' or 'all_gather' over all ranks"
        )
    cycles = hamiltonian_cycles(g + 1)
    start = np.argmax(cycles == g, axis=1)[:, None]
    return np.take_along_axis(cycles, (start + np.arange(1, g + 1)) % (g + 1), axis=1)


def multinode(num_ranks: int, ranks_per_node: int) -> Schedule:
    """Chain the paths of each node into g rings over all nodes.

    Ring j follows path j of node 0, crosses to the start of path j in node 1, and so on round
    (TASP, arXiv 2509.26541, multi-node form). In every step all links inside the nodes carry one
    piece, and every rank sends one piece to the next node and receives one.

    Args:
        num_ranks: n, all ranks; node by node.
        ranks_per_node: g; divides n, at least two nodes, not 3 or 5.

    Returns:
        A schedule of n - 1 steps and g lanes; each rank owns g pieces.

    Raises:
        ValueError: If `ranks_per_node` is not allowed.

    Example:
        >>> schedule = multinode(16, ranks_per_node=8)
        >>> schedule.validate()
        >>> schedule.num_steps, schedule.num_lanes
        (15, 8)
    """
    n = at_least("num_ranks", num_ranks, 2)
    g = at_least("ranks_per_node", ranks_per_node, 1)
    if n % g or n == g:
        raise ValueError(
            f"ranks_per_node must divide num_ranks={n} into at least two nodes; got {g}"
        )
    paths = hamiltonian_paths(g)
    cycles = np.concatenate([paths + node * g for node in range(n // g)], axis=1)
    return from_cycles("multinode", cycles)
