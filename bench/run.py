"""Measure cases one after another; a row each, printed as it comes and kept at once."""

import dataclasses
import gc
import sys
from collections.abc import Iterator, Sequence

from bench.case import Case, OpCase, WrongResult
from bench.registry import pick
from bench.rows import Machine, Row, make_row
from jaxinfer.pallas_kernels.dispatch import NotSupported

_COLUMNS = ("µs", "± iqr", "GB/s", "TFLOP/s", "floor")


@dataclasses.dataclass
class Report:
    """What could not be measured through somebody's fault.

    Attributes:
        bad: A line for each that was wrong or failed.
    """

    bad: list[str] = dataclasses.field(default_factory=list)

    def note(self, case: Case, name: str, what: str, *, bad: bool = True) -> None:
        """Show a line; remember it if it is bad."""
        line = f"{case.name}, {name}: {what}"
        if bad:
            self.bad.append(line)
        print(line, file=sys.stderr, flush=True)

    def print(self) -> None:
        """Show what was bad once more: lines scroll away in a long run."""
        if self.bad:
            print("\nwrong or failed:", *self.bad, sep="\n  ", file=sys.stderr)


def measure_all(
    op: str,
    cases: Sequence[Case],
    *,
    wanted: Sequence[str],
    repeats: int,
    machine: Machine,
    report: Report,
) -> Iterator[Row]:
    """Rows of all cases; what cannot be measured is reported on standard error.

    Args:
        op: Name for the rows.
        cases: What to measure.
        wanted: Implementations; empty: all.
        repeats: Timed calls each.
        machine: For the rows.
        report: Takes what has no time.
    """
    columns = "{:>10} {:>8} {:>7} {:>8} {:>6}".format(*_COLUMNS)
    print(f"{op} on {machine.device}\n{'case':38} {'implementation':25} {columns}", flush=True)
    for case in cases:
        names = pick(case, wanted)
        if isinstance(case, OpCase):
            case.prepare(names)
        for name in names:
            try:
                measured = case.measure(name, repeats=repeats)
            except NotSupported as reason:
                report.note(case, name, f"not supported: {reason}", bad=False)
            except WrongResult as error:
                report.note(case, name, f"WRONG: {error}")
            except Exception as error:  # a peer that fails must not cost the other rows
                report.note(case, name, f"failed: {type(error).__name__}: {str(error)[:300]}")
            else:
                row = make_row(op, case, name, measured, machine)
                print(_line(row), flush=True)
                if measured.details:
                    print(f"  {measured.details}", flush=True)
                yield row
            if not isinstance(case, OpCase):
                gc.collect()  # engines hold gigabytes and hang in cycles
        if isinstance(case, OpCase):
            case.finish()
        gc.collect()


def _line(row: Row) -> str:
    name = row["implementation"] + (f" ({row['ran']})" if "ran" in row else "")
    return (
        f"{row['case']:38} {name:25} {row['median_us']:10.2f} {row['iqr_us']:8.2f} "
        f"{row['gbps']:7.0f} {row['tflops']:8.1f} {row['floor_share']:6.1%}"
    )
