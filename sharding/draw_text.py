"""A schedule as readable text: rings, routes and the links that each step uses."""

import numpy as np
import numpy.typing as npt

from jaxinfer.sharding.schedule import Schedule

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def lane_letter(lane: int) -> str:
    """One character for a lane; '#' from the 63rd on."""
    return LETTERS[lane] if lane < len(LETTERS) else "#"


def rings(destination: npt.NDArray[np.int32]) -> list[list[int]]:
    """Split a lane of one step, destination [n], into the rings that it consists of.

    Example:
        >>> rings(np.array([1, 2, 0, 4, 3], np.int32))
        [[0, 1, 2], [3, 4]]
    """
    left = set(range(len(destination)))
    found = []
    while left:
        ring = [min(left)]
        left.remove(ring[0])
        while (following := int(destination[ring[-1]])) in left:
            ring.append(following)
            left.remove(following)
        found.append(ring)
    return found


def looks_alike(schedule: Schedule) -> bool:
    """Whether one step shows all that there is to see: fixed rings, or a direct all-gather."""
    return schedule.has_fixed_links and (schedule.keeps_lanes or schedule.is_direct)


def describe(schedule: Schedule, steps: int | None = None) -> str:
    """Write a schedule as text.

    Args:
        schedule: Any schedule.
        steps: Steps to draw; None: all, or the first where all are alike.

    Returns:
        Lines: a summary, the route of each piece of rank 0, and per step the rings of each lane
        and a grid of links (row sends to column). A cell names the lane that uses the link or,
        where pieces change lanes, the owner of the piece on it.
    """
    n, lanes = schedule.num_ranks, schedule.num_lanes
    used, links = n * lanes if schedule.num_steps else 0, n * (n - 1)
    lines = [
        f"{schedule.name}: {n} ranks, {schedule.pieces_per_rank} pieces per rank, "
        f"{schedule.num_steps} steps, {lanes} lanes",
        f"links: {used} of {links} directed links carry a piece in every step"
        + (f" ({used / links:.0%})" if links else ""),
    ]
    if not schedule.num_steps:
        return "\n".join([*lines, "one rank: nothing to send"])
    same = looks_alike(schedule)
    shown = range(min(schedule.num_steps, 1 if same and steps is None else steps or n * n))
    lines += ["", *_route_lines(schedule)]
    for step in shown:
        title = f"step {step}"
        if same and steps is None and schedule.num_steps > 1:
            title = f"steps 0 to {schedule.num_steps - 1} (all alike)"
        lines += ["", title]
        if step == 0 or not schedule.has_fixed_links:
            lines += [*_ring_lines(schedule.destination[step])]
        lines += ["", *_grid_lines(schedule, step)]
    return "\n".join(lines)


def _route_lines(schedule: Schedule) -> list[str]:
    first = schedule.own_pieces()[0]
    try:
        routes = schedule.routes()[first]
    except ValueError:
        steps = [int(np.argwhere(schedule.piece[:, 0, 0] == piece)[0, 0]) for piece in first]
        return ["pieces of rank 0, each sent by rank 0 to all other ranks:"] + [
            f"  piece {piece}: step {step}" for piece, step in zip(first, steps, strict=True)
        ]
    return ["routes of the pieces of rank 0:"] + [
        f"  piece {piece}: " + " > ".join(map(str, route))
        for piece, route in zip(first, routes, strict=True)
    ]


def _ring_lines(destination: npt.NDArray[np.int32]) -> list[str]:
    return [
        f"  lane {lane_letter(lane)}: "
        + "  ".join("(" + " ".join(map(str, ring)) + ")" for ring in rings(column))
        for lane, column in enumerate(destination.T)
    ]


def _grid_lines(schedule: Schedule, step: int) -> list[str]:
    """Grid of links: row sends, column receives."""
    n = schedule.num_ranks
    width = len(str(n - 1)) + 1
    grid = np.full((n, n), ".", dtype=object)
    by_lane = schedule.keeps_lanes or schedule.is_direct
    for lane, column in enumerate(schedule.destination[step].T):
        owners = schedule.owner[schedule.piece[step, :, lane]]
        grid[np.arange(n), column] = lane_letter(lane) if by_lane else owners.astype(str)
    grid[np.arange(n), np.arange(n)] = ""
    what = "lane" if by_lane else "owner of the piece"
    head = "  to  " + " " * width + "".join(f"{rank:>{width}}" for rank in range(n))
    rows = [
        f"  from{rank:>{width}}" + "".join(f"{cell:>{width}}" for cell in grid[rank]).rstrip()
        for rank in range(n)
    ]
    return [f"  {what} on each link", head, *rows]
