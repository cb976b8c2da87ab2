"""Saved rows as tables and pictures show them: cases by implementations, a grid per device."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bench.registry import cases_of
from bench.rows import RESULTS, Row, load


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """The rows of an op on one device.

    Attributes:
        op: Name of the op.
        key: Folder of the device.
        rows: By case and implementation; at least one.
        cases: In the order of the registry; those it no longer has come last.
        implementations: In the same order.
    """

    op: str
    key: str
    rows: Mapping[tuple[str, str], Row]
    cases: tuple[str, ...]
    implementations: tuple[str, ...]

    @property
    def device(self) -> str:
        """Name of the device."""
        return next(iter(self.rows.values()))["device"]

    @property
    def is_whole_model(self) -> bool:
        """Whether it is an end-to-end benchmark: times in ms, tokens per second."""
        return self.op.startswith("e2e_")

    def of(self, case: str) -> dict[str, Row]:
        """Rows of a case by implementation."""
        found = {name: self.rows.get((case, name)) for name in self.implementations}
        return {name: row for name, row in found.items() if row is not None}

    def ours(self, case: str) -> Row | None:
        """The row that speaks for us: the chooser's, else our kernel's, else its best tiling's."""
        rows = self.of(case)
        tilings = [row for name, row in rows.items() if name.startswith("mosaic-")]
        best = min(tilings, key=lambda row: row["median_us"], default=None)
        return rows.get("dispatch") or rows.get("mosaic") or best

    def floor_us(self, case: str) -> float:
        """Floor of a case, µs; 0 where nobody measured the device's ceilings."""
        return (self.ours(case) or next(iter(self.of(case).values())))["floor_us"]

    @property
    def provenance(self) -> str:
        """Driver, JAX, commit and date; all of them where rows differ."""
        rows = self.rows.values()
        drivers, versions = (_distinct(row[key] for row in rows) for key in ("driver", "jax"))
        commits = _distinct((row["commit"], row["date"]) for row in rows)
        parts = [f"driver {' and '.join(drivers)}"] if any(drivers) else []
        parts.append(f"JAX {' and '.join(versions)}")
        if len(commits) == 1:
            parts += [f"commit {commits[0][0]}", commits[0][1]]
        else:
            parts.append("commits " + ", ".join(f"{commit} ({date})" for commit, date in commits))
        return ", ".join(parts)

    @property
    def dates(self) -> str:
        """The day, or the first and the last."""
        days = sorted({row["date"] for row in self.rows.values()})
        return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def grids(op: str, *, words: Sequence[str] = (), results: Path = RESULTS) -> list[Grid]:
    """What was measured of an op, by device; nothing if nothing was.

    Cases with the tag `"ci"` are left out.

    Args:
        op: Name of the op.
        words: Only cases whose names hold all of them.
        results: Folder with `<device>/<op>.json`.

    Raises:
        ValueError: no such op.
    """
    known = cases_of(op)
    small = {case.name for case in known if case.tag == "ci"}
    found = []
    for path in sorted(results.glob(f"*/{op}.json")):
        rows = {
            (row["case"], row["implementation"]): row
            for row in load(path)
            if row["case"] not in small and set(words) <= set(row["case"].split())
        }
        if rows:
            names = (name for case in known for name in case.implementations)
            grid = Grid(
                op=op,
                key=path.parent.name,
                rows=rows,
                cases=_ordered((case for case, _ in rows), (case.name for case in known)),
                implementations=_ordered((name for _, name in rows), names),
            )
            found.append(grid)
    return found


def number(value: float) -> str:
    """Three digits, or the whole part: 0.0129, 2.08, 53.9, 14,140."""
    digits = sum(value < limit for limit in (100, 10, 1, 0.1))
    return f"{value:,.{digits}f}"


def percent(share: float) -> str:
    """A share in percent, with a decimal below 10 %."""
    return f"{share:.0%}" if share >= 0.0995 else f"{share:.1%}"


def _distinct(values: Iterable) -> list:
    return list(dict.fromkeys(values))


def _ordered(present: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    held = _distinct(present)
    order = _distinct(known)
    return (*(name for name in order if name in held), *(n for n in held if n not in order))
