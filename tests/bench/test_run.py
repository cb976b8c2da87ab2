"""A run: rows for what was measured, a line for what was not, and the others go on."""

import pytest

from bench.case import Measurement, WrongResult
from bench.run import Report, measure_all
from jaxinfer.pallas_kernels.dispatch import NotSupported
from tests.bench.fakes import MACHINE, FakeCase

GOOD = Measurement(median_us=2.0, iqr_us=0.1, rel_rms=0.0, compile_s=0.1, implementation="xla")


def run(case, wanted=()):
    """Rows and report."""
    report = Report()
    rows = measure_all(
        "op", [case], wanted=wanted, repeats=1, machine=MACHINE, report=report
    )  # fmt: skip
    return list(rows), report


def test_what_fails_costs_no_other_row(capsys):
    case = FakeCase(
        {
            "wrong": WrongResult("relative RMS error 1"),
            "refuses": NotSupported("op", "refuses", "this device"),
            "crashes": RuntimeError("out of memory"),
            "dispatch": GOOD,
        }
    )
    rows, report = run(case)
    assert [(row["implementation"], row["ran"]) for row in rows] == [("dispatch", "xla")]
    assert report.bad == [
        "fake b1, wrong: WRONG: relative RMS error 1",
        "fake b1, crashes: failed: RuntimeError: out of memory",
    ]
    shown = capsys.readouterr()
    assert "dispatch (xla)" in shown.out
    assert "refuses: not supported" in shown.err
    report.print()
    assert capsys.readouterr().err.count("\n  ") == 2


def test_a_good_run_has_nothing_to_report(capsys):
    rows, report = run(FakeCase({"a": GOOD, "b": GOOD}), wanted=["b"])
    assert [row["implementation"] for row in rows] == ["b"]
    report.print()
    assert capsys.readouterr().err == ""


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="did you mean 'cudnn'"):
        run(FakeCase({"cudnn": GOOD}), wanted=["cudn"])
