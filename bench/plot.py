"""Pictures of the saved rows: a bar per case and implementation, a picture per op and device."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.grid import Grid, grids, number
from bench.registry import OPS
from bench.rows import RESULTS, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes  # pyright: ignore[reportMissingImports]
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

# Text stays text, which is small; a fixed salt makes the same picture the same file.
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "jaxinfer",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 8.5,
}
_WIDTH = 800 / 96  # inches; a browser shows 800 pixels
_LINE = 0.165  # inches that a bar takes
_LEFT, _RIGHT, _TOP, _BOTTOM, _BETWEEN = 1.85, 0.15, 0.80, 0.35, 0.45  # inches
_OURS, _PEER, _TEXT, _FAINT = "#1a56b0", "#c3cad6", "#1f2937", "#6b7280"
_WHAT = {
    "e2e_decode": "Decode of a whole model",
    "e2e_prefill": "Prefill of a whole model",
}
_LENGTHS = {
    "e2e_decode": "Bars: ms per token of a request, shorter is better; black line: the floor",
    "e2e_prefill": "Bars: ms to the first token, shorter is better; black line: the floor",
}


def plot_all(op: str, out: Path, *, results: Path = RESULTS) -> list[Path]:
    """Draw the results of an op, or of every op that has some.

    Args:
        op: Name of the op; empty: all.
        out: Folder; the pictures become `<device>/<op>.svg`.
        results: Folder with `<device>/<op>.json`.

    Returns:
        The pictures.

    Raises:
        ValueError: no such op, no results of it, or no matplotlib.
    """
    found = [grid for name in ([op] if op else OPS) for grid in grids(name, results=results)]
    if op and not found:
        raise ValueError(f"no results of {op}; python -m bench run --op {op} --save")
    return [
        save(functools.partial(draw, grid), out / grid.key / f"{grid.op}.svg") for grid in found
    ]


def save(picture: "Callable[[], Figure]", path: Path) -> Path:
    """Draw a picture in the style of all, and write it; the same picture is the same file.

    Raises:
        ValueError: no matplotlib.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("pictures need matplotlib: pip install 'jaxinfer[bench]'")
    import matplotlib  # pyright: ignore[reportMissingImports]

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(_STYLE):
        picture().savefig(path, metadata={"Date": None, "Creator": None})
    lines = (line.rstrip() for line in path.read_text().splitlines())
    path.write_text("\n".join(lines) + "\n")
    return path


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Panel:
    """Cases that share an axis.

    Attributes:
        grid: The rows.
        cases: Names.
        shares: Bars are shares of the floor; else times.
    """

    grid: Grid
    cases: list[str]
    shares: bool

    @property
    def lines(self) -> float:
        """Height, in bars: one for the name of each case, half of one behind it."""
        return sum(len(_bars(self.grid, case)) + 1.5 for case in self.cases)

    def length(self, row: Row) -> float:
        """Of a bar."""
        return row["floor_share"] if self.shares else _in_unit(row["median_us"], self.grid)

    def floor(self, case: str) -> float:
        """Where the line of the floor stands; 0: nowhere."""
        return 1.0 if self.shares else _in_unit(self.grid.floor_us(case), self.grid)


def draw(grid: Grid) -> "Figure":
    """The picture of an op on a device."""
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    panels = list(_panels(grid))
    inches = _TOP + _BOTTOM + _BETWEEN * (len(panels) - 1)
    inches += _LINE * sum(panel.lines for panel in panels)
    figure = Figure(figsize=(_WIDTH, inches), facecolor="white")
    _write_title(figure, grid, inches, shares=panels[0].shares)
    top = _TOP
    for panel in panels:
        height = _LINE * panel.lines
        left, width = _LEFT / _WIDTH, 1 - (_LEFT + _RIGHT) / _WIDTH
        axes = figure.add_axes((left, 1 - (top + height) / inches, width, height / inches))
        _draw_panel(axes, panel)
        top += height + _BETWEEN
    return figure


def _panels(grid: Grid) -> Iterable[_Panel]:
    """One for shares; for times one per model, since small models would vanish beside large."""
    if not grid.is_whole_model and all(grid.floor_us(case) for case in grid.cases):
        yield _Panel(grid=grid, cases=list(grid.cases), shares=True)
        return
    for model in dict.fromkeys(case.split()[0] for case in grid.cases):
        cases = [case for case in grid.cases if case.split()[0] == model]
        yield _Panel(grid=grid, cases=cases, shares=False)


def _write_title(figure: "Figure", grid: Grid, inches: float, *, shares: bool) -> None:
    def write(text: str, below: float, **style) -> None:
        figure.text(0.1 / _WIDTH, 1 - below / inches, text, va="top", **style)

    what = _WHAT.get(grid.op, grid.op)
    write(f"{what} on {grid.device}, {grid.dates}", 0.1, fontsize=11, weight="bold", color=_TEXT)
    lengths = (
        "Bars: share of the floor, longer is better; at their ends the median time"
        if shares
        else _LENGTHS.get(grid.op, "Bars: median time of a call, shorter is better")
    )
    write(lengths, 0.34, color=_FAINT)


def _draw_panel(axes: "Axes", panel: _Panel) -> None:
    rows = [row for case in panel.cases for row in _bars(panel.grid, case).values()]
    longest = max(panel.length(row) for row in rows)
    axes.set_xlim(0, max(1.0, longest) * 1.09 if panel.shares else longest * 1.32)
    axes.set_ylim(panel.lines, 0)
    line = 0.0
    for case in panel.cases:
        _draw_header(axes, panel, case, line + 0.55)
        bars = _bars(panel.grid, case)
        for place, (label, row) in enumerate(bars.items()):
            _draw_bar(axes, panel, label, row, line + 1.5 + place)
        floor = panel.floor(case)
        if floor:
            ends = line + 1, line + 1 + len(bars)
            axes.plot([floor, floor], ends, color="black", linewidth=1.2)
        line += len(bars) + 1.5
    _style_axes(axes, shares=panel.shares)


def _draw_header(axes: "Axes", panel: _Panel, case: str, middle: float) -> None:
    across = axes.get_yaxis_transform()  # x in parts of the width, y in lines
    left = -(_LEFT - 0.1) / (_WIDTH - _LEFT - _RIGHT)
    axes.text(left, middle, case, transform=across, va="center", weight="bold", color=_TEXT)
    floor = panel.grid.floor_us(case)
    if floor:
        x, side = (1 / axes.get_xlim()[1], "center") if panel.shares else (1, "right")
        note = f"floor {_time(floor, panel.grid)}"
        axes.text(x, middle, note, transform=across, va="center", ha=side, color=_FAINT)


def _draw_bar(axes: "Axes", panel: _Panel, label: str, row: Row, middle: float) -> None:
    ours = row is panel.grid.ours(row["case"])
    dark, weight = (_OURS, "bold") if ours else (_TEXT, "normal")
    length = panel.length(row)
    axes.barh(middle, length, height=0.78, color=_OURS if ours else _PEER, linewidth=0)

    def write(text: str, x: float, points: int, side: str, color: str) -> None:
        axes.annotate(
            text, (x, middle), (points, 0), textcoords="offset points", ha=side, va="center",
            annotation_clip=False, weight=weight, color=color,
        )  # fmt: skip

    write(label, 0, -5, "right", dark)
    if panel.shares and length > 0.85:  # outside, the line of the floor would cross the text
        write(_note(row, panel.grid), min(length, 1.0), -4, "right", "white" if ours else _TEXT)
    else:
        write(_note(row, panel.grid), length, 4, "left", dark)


def _style_axes(axes: "Axes", *, shares: bool) -> None:
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="x", color="#e5e7eb", linewidth=0.8)
    axes.set_yticks([])
    axes.tick_params(length=0, labeltop=True, labelcolor=_FAINT)
    if shares:
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])


def _bars(grid: Grid, case: str) -> dict[str, Row]:
    """Rows by label. What `dispatch` took is named beside it and has no bar of its own."""
    rows = grid.of(case)
    taken = rows.get("dispatch", {}).get("ran")
    return {
        f"{name} ({taken})" if name == "dispatch" and taken else name: row
        for name, row in rows.items()
        if name != taken
    }


def _note(row: Row, grid: Grid) -> str:
    time = _time(row["median_us"], grid)
    return f"{time}, {number(row['tokens_per_s'])} tokens/s" if grid.is_whole_model else time


def _in_unit(us: float, grid: Grid) -> float:
    return us / 1e3 if grid.is_whole_model else us


def _time(us: float, grid: Grid) -> str:
    return f"{number(_in_unit(us, grid))} {'ms' if grid.is_whole_model else 'µs'}"
