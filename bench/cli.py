"""The command line of the benchmarks."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jaxinfer.cli import errors, interrupts, streams

if TYPE_CHECKING:
    from bench.case import Case

PROG = "python -m bench"
DESCRIPTION = """Benchmarks of jaxinfer: correctness first, then the time.

Examples:
  python -m bench list
  python -m bench run --op decode_attention
  python -m bench run --op attention --impl dispatch,cudnn --case "llama-3-8b b1" --json out.json
  python -m bench run --e2e decode
  python -m bench run --op ring_attention --devices 2
  python -m bench plot --op decode_attention
  python -m bench tables
"""

Tag = Literal["primary", "stress", "ci", "all"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Measure and print a row per case and implementation."""

    op: str = ""
    """Which op; see `python -m bench list`. Several with commas; default: all."""
    e2e: Literal["", "prefill", "decode"] = ""
    """Adds e2e_prefill or e2e_decode to --op."""
    impl: str = ""
    """Implementations, with commas; default: all."""
    case: str = ""
    """Only cases whose names hold all of these words."""
    tag: Tag = "primary"
    """Only cases with this tag."""
    repeats: int = 20
    """Timed calls of each."""
    devices: int | None = None
    """Devices of ring_attention; default: all."""
    json: Path | None = None
    """Put the rows into this file too; those already there stay unless measured again."""
    save: bool = False
    """Put the rows into bench/results/<device>/<op>.json; all changes must have a commit."""
    commit: str = ""
    """Commit for the rows where the checkout has no history."""

    def run(self) -> int:
        """Do it; 1 if anything was wrong or failed, or nothing could be measured."""
        from bench import checks, registry, rows
        from bench.run import Report, measure_all
        from jaxinfer.pallas_kernels.device import current_device

        checks.check_numbers(repeats=self.repeats, devices=self.devices)
        if self.json is not None:
            checks.check_json(self.json)
        asked = self.op.split(",") if self.op else []
        names = [*asked, *([f"e2e_{self.e2e}"] if self.e2e else [])] or registry.OPS
        wanted = [name for name in self.impl.split(",") if name]
        chosen = {op: self._cases(op, wanted) for op in names}
        # Among all ops, one that needs more devices is reported and the others are measured.
        if "ring_attention" in asked:
            checks.check_devices(self.devices)
        machine = rows.Machine.here(self.commit)
        if self.save and machine.commit.endswith("-dirty"):
            raise ValueError(
                "--save keeps what can be measured again, and there are changes without a commit: "
                "commit them, or take --json FILE"
            )
        report, measured = Report(), 0
        for op, cases in chosen.items():
            for row in measure_all(
                op, cases, wanted=wanted, repeats=self.repeats, machine=machine, report=report
            ):
                measured += 1
                if self.json is not None:
                    rows.save(self.json, [row])
                if self.save:
                    rows.save(rows.results_of(current_device(), op), [row])
        report.print()
        if not measured and not report.bad:
            print("error: nothing could be measured", file=sys.stderr)
        return int(bool(report.bad) or not measured)

    def _cases(self, op: str, wanted: Sequence[str]) -> "list[Case]":
        from bench import registry

        known = registry.cases_of(op, devices=self.devices)
        words = self.case.split()
        cases = registry.select(known, tag=self.tag, words=words)
        if not cases:
            raise ValueError(
                f"no case of {op} has tag {self.tag!r} and words {self.case!r}"
                + registry.near_words(words, known)
            )
        for case in cases:
            registry.pick(case, wanted)  # refuses a name before anything is measured
        return cases


@dataclasses.dataclass(frozen=True, kw_only=True)
class List:
    """Show ops, cases and implementations."""

    op: str = ""
    """Only this op."""
    tag: Tag | None = None
    """Only cases with this tag; default: all but ci."""
    devices: int | None = None
    """Devices of ring_attention, which need not be there; default: all."""

    def run(self) -> int:
        """Do it."""
        from bench import checks, registry

        checks.check_numbers(devices=self.devices)
        for op in [self.op] if self.op else registry.OPS:
            devices = self.devices if self.op or op == "ring_attention" else None
            cases = registry.cases_of(op, devices=devices)
            print(op)
            for case in cases:
                if self.tag in (case.tag, "all") or (self.tag is None and case.tag != "ci"):
                    print(f"  {case.name:44} {', '.join(case.implementations)}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tune:
    """Make the choosers' tables of this device from the saved rows of flat_matmul."""

    def run(self) -> int:
        """Do it."""
        from bench.tune import write

        print(write())
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plot:
    """Draw the committed results of an op as SVG pictures."""

    op: str = ""
    """Only this op."""
    out: Path = Path("docs/plots")
    """Folder for the pictures."""

    def run(self) -> int:
        """Do it."""
        from bench.plot import plot_all

        for path in plot_all(self.op, self.out):
            print(path)
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tables:
    """Write the committed results into the tables of README and docs."""

    check: bool = False
    """Only say whether the tables are those of the results."""

    def run(self) -> int:
        """Do it; with --check 1 if a table is out of date."""
        from bench.tables import update_all

        changed = update_all(write=not self.check)
        for path in changed:
            print(f"{path}: {'out of date' if self.check else 'written'}")
        return int(self.check and bool(changed))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 2 for wrong arguments. Ctrl-C ends the process with 130.

    Rows are in their files by then: each is kept as it comes, and a file is replaced as a whole.
    """
    with interrupts.handled(last=arguments is None):
        return _run(arguments)


def _run(arguments: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _parse(given).run()
        streams.finish()
        return code
    except BrokenPipeError:  # as in `python -m bench list | head`
        errors.silence_stdout()
        return errors.FAILED
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parse(arguments: Sequence[str]) -> Any:
    """The command that arguments ask for, an object with `run()`."""
    import tyro  # here, as it takes long and Ctrl-C has its handler now

    commands = {kind.__name__.lower(): kind for kind in (Run, List, Tune, Plot, Tables)}
    words = [PROG, *(name for name in arguments[:1] if name in commands), "--help"]
    with errors.one_line_usage(" ".join(words)):
        return tyro.extras.subcommand_cli_from_dict(
            commands, prog=PROG, description=DESCRIPTION, args=arguments
        )
