"""Tables of README and docs, written between their markers from the saved rows.

A marker is a line `<!-- bench:OP -->`, with options if need be; `<!-- /bench -->` ends the block.
`bench/README.md` says what the options are.
"""

import dataclasses
import re
from pathlib import Path

from bench.grid import Grid, grids, number, percent
from bench.registry import cases_of, select
from bench.rows import RESULTS, Row

REPOSITORY = Path(__file__).resolve().parent.parent
_END = "<!-- /bench -->"
_OPTION = re.compile(r'\s+(\w+)="([^"]*)"')
_START = re.compile(rf"<!-- bench:(\w+)((?:{_OPTION.pattern})*) -->")
_NONE = "–"
_OURS = "ours"  # a column for what speaks for us (`Grid.ours`), with its name

# What is measured of a whole model.
_UNITS = {
    "e2e_decode": "Median ms per token of a request, in parentheses tokens/s of all requests",
    "e2e_prefill": "Median ms to the first token, in parentheses tokens/s of the prompt",
}
# What a row's `ran` is, where it is not what the chooser took.
_RAN = {"ring_attention": "the local attention"}


def update_all(*, write: bool, root: Path = REPOSITORY, results: Path = RESULTS) -> list[Path]:
    """Make every marked block in `README.md` and `docs` anew.

    Args:
        write: Write the files; else only look.
        root: Folder that holds `README.md` and `docs`.
        results: Folder with `<device>/<op>.json`.

    Returns:
        The files whose blocks are not those of the results (before writing).

    Raises:
        ValueError: a marker is malformed, not closed, or names what does not exist. Nothing is
            written then.
    """
    changed = {}
    for path in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        new = regenerate(text, where=str(path.relative_to(root)), results=results)
        if new != text:
            changed[path] = new
    if write:
        for path, text in changed.items():
            path.write_text(text, encoding="utf-8")
    return list(changed)


def regenerate(text: str, *, where: str, results: Path = RESULTS) -> str:
    """`text` with every marked block made anew; `where` is its name in errors."""
    kept, opened = [], 0
    for count, line in enumerate(text.splitlines(keepends=True), start=1):
        stripped = line.rstrip()
        try:
            if stripped.startswith("<!-- bench"):
                if opened:
                    raise ValueError(f"the marker of line {opened} is not closed")
                opened = count
                kept += [line, f"\n{_block(Marker.parse(stripped), results)}\n\n"]
            elif stripped == _END:
                if not opened:
                    raise ValueError("closes a marker that was not opened")
                opened = 0
        except ValueError as error:
            raise ValueError(f"{where}, line {count}: {error}") from error
        if not opened:
            kept.append(line)
    if opened:
        raise ValueError(f"{where}, line {opened}: the marker is not closed by {_END}")
    return "".join(kept)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Marker:
    """What a marker asks for.

    Attributes:
        op: Name of the op.
        words: Only cases whose names hold all of these.
        impl: Only these implementations, in this order; empty: all.
        device: Only results of the device whose folder this is; empty: of all.
    """

    op: str
    words: tuple[str, ...] = ()
    impl: tuple[str, ...] = ()
    device: str = ""

    @classmethod
    def parse(cls, line: str) -> "Marker":
        """Read a marker and check that all it names exists.

        Raises:
            ValueError: it does not, or the line is malformed.
        """
        match = _START.fullmatch(line)
        if match is None:
            raise ValueError(
                f'expected <!-- bench:OP words="…" impl="…" device="…" -->; got {line}'
            )
        options = dict(_OPTION.findall(match[2]))
        words = tuple(options.pop("words", "").split())
        impl = tuple(name.strip() for name in options.pop("impl", "").split(",") if name.strip())
        device = options.pop("device", "")
        if options:
            raise ValueError(f"unknown option {next(iter(options))!r}; known: words, impl, device")
        cases = select(cases_of(match[1]), tag="all", words=words)
        if not cases:
            raise ValueError(f"no case of {match[1]} has the words {' '.join(words)!r}")
        known = dict.fromkeys(name for case in cases for name in case.implementations)
        for name in impl:
            if name not in known and name != _OURS:
                raise ValueError(f"unknown implementation {name!r}; known: {', '.join(known)}")
        return cls(op=match[1], words=words, impl=impl, device=device)


def _block(marker: Marker, results: Path) -> str:
    command = f"`python -m bench run --op {marker.op} --save`"
    found = grids(marker.op, words=marker.words, results=results)
    if marker.device:
        known = sorted(path.name for path in results.iterdir())
        if marker.device not in known:
            raise ValueError(f"unknown device {marker.device!r}; known: {', '.join(known)}")
        found = [grid for grid in found if grid.key == marker.device]
    if not found:
        return f"Not measured yet; {command} does it."
    return "\n\n".join(_table(grid, marker.impl) for grid in found) + f"\n\nMade by {command}."


def _table(grid: Grid, impl: tuple[str, ...]) -> str:
    shown = impl or grid.implementations
    unit = "ms" if grid.is_whole_model else "µs"
    head = ["case", *(f"`{name}`" for name in shown), f"floor, {unit}", "floor reached by ours"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    lines += [_line(grid, case, shown) for case in grid.cases]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{_caption(grid, shown)}\n\n{table}"


def _caption(grid: Grid, shown: tuple[str, ...]) -> str:
    what = _UNITS.get(grid.op, "Median µs of a call")
    if any("ran" in row for row in grid.rows.values()):
        what += f", in parentheses {_RAN.get(grid.op, 'what `dispatch` took')}"
    left_out = [
        name
        for name in grid.implementations
        if name not in shown and not (_OURS in shown and _is_ours(name))
    ]
    best = "the fastest, where ours had a rival"
    if left_out:
        best += "; those left out here compete too"
    note = f"; {_NONE}: not supported or not measured" if _has_gaps(grid, shown) else ""
    return f"{grid.device}, {grid.provenance}. {what}; bold: {best}{note}."


def _has_gaps(grid: Grid, shown: tuple[str, ...]) -> bool:
    return any(
        (case, name) not in grid.rows if name != _OURS else grid.ours(case) is None
        for case in grid.cases
        for name in shown
    )


def _line(grid: Grid, case: str, shown: tuple[str, ...]) -> list[str]:
    rows, ours = grid.of(case), grid.ours(case)
    if _OURS in shown and ours:
        others = {name: row for name, row in rows.items() if not _is_ours(name)}
        tiling = ours["implementation"].removeprefix("mosaic-")
        rows = others | {_OURS: {"ran": tiling} | ours}
    twins = {"dispatch", rows.get("dispatch", {}).get("ran")}  # one kernel: noise decides
    if twins & set(shown):
        rivals = {name: row for name, row in rows.items() if name in shown or name not in twins}
    else:
        rivals = rows
    # Ours alone win nothing: bold says that somebody else was measured too.
    competed = any(name not in twins and not _is_ours(name) for name in rivals)
    best = min((row["median_us"] for row in rivals.values()), default=0.0) if competed else 0.0
    cells = [_cell(rows[name], grid, best) if name in rows else _NONE for name in shown]
    floor = grid.floor_us(case)
    share = percent(ours["floor_share"]) if ours and floor else _NONE
    return [case, *cells, _time(floor, grid) if floor else _NONE, share]


def _is_ours(name: str) -> bool:
    return name in ("dispatch", "mosaic", _OURS) or name.startswith("mosaic-")


def _cell(row: Row, grid: Grid, best: float) -> str:
    time = _time(row["median_us"], grid)
    if time == _time(best, grid):
        time = f"**{time}**"
    beside = number(row["tokens_per_s"]) if grid.is_whole_model else row.get("ran")
    return f"{time} ({beside})" if beside else time


def _time(us: float, grid: Grid) -> str:
    return number(us / 1e3 if grid.is_whole_model else us)
