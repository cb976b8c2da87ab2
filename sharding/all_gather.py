"""Direct staged all-gather: every owner sends its pieces to all ranks itself."""

import numpy as np

from jaxinfer.sharding.checks import at_least
from jaxinfer.sharding.schedule import Schedule


def all_gather(num_ranks: int, pieces: int | None = None) -> Schedule:
    """Send piece t of every rank to all others in step t.

    Loads links as the Hamiltonian rings do when `pieces` is n - 1, without a table; pieces can
    be cut finer to make buffers smaller. Nothing is passed on, so owners must keep their block.

    Args:
        num_ranks: n, at least 1.
        pieces: m, steps; None: n - 1.

    Returns:
        A schedule of m steps and n - 1 lanes; lane d - 1 sends to rank r + d modulo n.

    Raises:
        ValueError: If `num_ranks` or `pieces` is below 1.

    Example:
        >>> schedule = all_gather(3, pieces=4)
        >>> schedule.validate()
        >>> schedule.num_steps, schedule.num_lanes
        (4, 2)
    """
    n = at_least("num_ranks", num_ranks, 1)
    m = max(n - 1, 1) if pieces is None else at_least("pieces", pieces, 1)
    steps = m if n > 1 else 0
    ranks = np.arange(n, dtype=np.int32)[None, :, None]
    shape = (steps, n, n - 1)
    stage = np.arange(steps, dtype=np.int32)[:, None, None]
    return Schedule(
        name="all_gather",
        num_ranks=n,
        pieces_per_rank=m,
        owner=np.repeat(np.arange(n, dtype=np.int32), m),
        destination=np.broadcast_to((ranks + np.arange(1, n, dtype=np.int32)) % n, shape),
        piece=np.broadcast_to(ranks * m + stage, shape),
    )
