"""A schedule as an SVG picture: one panel per ring, or per step where links change."""

import math

import numpy as np
import numpy.typing as npt

from jaxinfer.sharding.draw_text import lane_letter, looks_alike
from jaxinfer.sharding.schedule import Schedule

PANEL, RADIUS, COLUMNS = 220, 78, 4


def svg(schedule: Schedule) -> str:
    """Draw a schedule.

    Fixed rings give one panel for each lane; others one for each step, with a colour for each
    lane or, where pieces change lanes, for each owner.
    Ranks stand on a circle, arrows are the directed links in use, and the strip under a panel is
    the share of all directed links that the panel's moves take.

    Args:
        schedule: Any schedule.

    Returns:
        The text of an SVG file.
    """
    lanes = np.arange(schedule.num_lanes)
    if schedule.num_steps == 0:
        panels = [_panel("one rank: nothing to send", np.empty((1, 0), np.int32), None)]
    elif looks_alike(schedule):
        panels = [
            _panel(f"lane {lane_letter(lane)}, every step", column[:, None], lanes[lane][None])
            for lane, column in enumerate(schedule.destination[0].T)
        ]
    else:
        colours = lanes if schedule.keeps_lanes else schedule.owner[schedule.piece]
        colours = np.broadcast_to(colours, schedule.piece.shape)
        panels = [
            _panel(f"step {step}", destination, colours[step])
            for step, destination in enumerate(schedule.destination)
        ]
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    width, height = max(columns * PANEL, 2 * PANEL), rows * PANEL + 40
    body = [
        f'<g transform="translate({i % columns * PANEL},{i // columns * PANEL + 40})">{panel}</g>'
        for i, panel in enumerate(panels)
    ]
    title = (
        f"{schedule.name}: {schedule.num_ranks} ranks, {schedule.num_steps} steps, "
        f"{schedule.num_lanes} lanes, {_share(schedule.link_share)} of links per step"
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="sans-serif" font-size="11">',
            '<rect width="100%" height="100%" fill="white"/>',
            f'<text x="12" y="24" font-size="14">{title}</text>',
            *body,
            "</svg>\n",
        ]
    )


def _share(value: float) -> str:
    return f"{value:.0%}"


def _panel(
    title: str, destination: npt.NDArray[np.int32], colours: npt.NDArray[np.integer] | None
) -> str:
    """One circle of ranks with the arrows of destination [n, lanes], coloured by number."""
    n, shown = destination.shape
    centre = PANEL / 2
    angle = 2 * math.pi * np.arange(n) / n - math.pi / 2
    x, y = centre + RADIUS * np.cos(angle), centre + RADIUS * np.sin(angle)
    dot = max(3.0, min(9.0, 200 / n))
    parts = [f'<text x="{centre}" y="14" text-anchor="middle">{title}</text>']
    numbers = np.broadcast_to(0 if colours is None else colours, destination.shape)
    for number in np.unique(numbers):
        arrows = [
            _arrow(x[rank], y[rank], x[to], y[to], dot)
            for (rank, slot), to in np.ndenumerate(destination)
            if numbers[rank, slot] == number
        ]
        colour = f"hsl({int(number) * 137.5 % 360:.0f},65%,42%)"
        parts.append(f'<path d="{"".join(arrows)}" stroke="{colour}" fill="none"/>')
    for rank in range(n):
        parts.append(f'<circle cx="{x[rank]:.1f}" cy="{y[rank]:.1f}" r="{dot:.1f}" fill="#223"/>')
        if dot > 6:
            parts.append(
                f'<text x="{x[rank]:.1f}" y="{y[rank] + 4:.1f}" text-anchor="middle" '
                f'fill="white">{rank}</text>'
            )
    share = shown / max(n - 1, 1)
    left, low = centre - RADIUS, PANEL - 12
    parts.append(f'<rect x="{left}" y="{low}" width="{2 * RADIUS}" height="5" fill="#dde"/>')
    parts.append(
        f'<rect x="{left}" y="{low}" width="{2 * RADIUS * share:.1f}" height="5" fill="#446">'
        f"<title>{_share(share)} of the directed links</title></rect>"
    )
    return "".join(parts)


def _arrow(x0: float, y0: float, x1: float, y1: float, dot: float) -> str:
    """Path from rim to rim of two dots, bent so that both directions can be seen."""
    length = math.hypot(x1 - x0, y1 - y0)
    ux, uy = (x1 - x0) / length, (y1 - y0) / length
    bend = 0.1 * length
    mx, my = (x0 + x1) / 2 - uy * bend, (y0 + y1) / 2 + ux * bend
    sx, sy, ex, ey = x0 + ux * dot, y0 + uy * dot, x1 - ux * dot, y1 - uy * dot
    # The head follows the curve's direction at its end.
    tx, ty = ex - mx, ey - my
    size = math.hypot(tx, ty) or 1.0
    tx, ty = tx / size, ty / size
    wings = [
        f"M{ex:.1f},{ey:.1f}L{ex - 6 * tx - side * 3 * ty:.1f},{ey - 6 * ty + side * 3 * tx:.1f}"
        for side in (1, -1)
    ]
    return f"M{sx:.1f},{sy:.1f}Q{mx:.1f},{my:.1f} {ex:.1f},{ey:.1f}" + "".join(wings)
