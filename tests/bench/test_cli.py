"""The command line of the benchmarks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import plot, rows, tables
from bench.cli import main
from bench.registry import OPS
from jaxinfer.pallas_kernels.device import CPU, use_device
from tests.bench.test_rows import KEYS
from tests.paths import REPOSITORY


def test_list_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "bench", "list"],
        capture_output=True, text=True, check=True, cwd=REPOSITORY, timeout=120,
    )  # fmt: skip
    heads = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert heads == list(OPS)
    assert "llama-3-8b b1 s1024" in done.stdout
    assert "\n  ci " not in done.stdout


def test_list_of_one_op(capsys):
    assert main(["list", "--op", "add_rms_norm"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "add_rms_norm"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("list --op atention", "error: unknown op 'atention'; did you mean 'attention'?"),
        ("run --op rope_kv_writ", "did you mean 'rope_kv_write'?"),
        ("run --op add_rms_norm --case nobody", "no case of add_rms_norm has tag 'primary'"),
        ("run --e2e decode --case smollm2", "words 'smollm2'; did you mean 'smollm2-135m'?"),
        ("run --op add_rms_norm --tag ci --impl xl", "did you mean 'xla'?"),
        ("plot --op e2e_decod", "did you mean 'e2e_decode'?"),
        ("run --op add_rms_norm --repeats 0", "--repeats must be at least 1; got 0"),
        ("run --repeats -3", "--repeats must be at least 1; got -3"),
        ("run --op ring_attention --devices 0", "--devices must be at least 2; got 0"),
        (
            "run --op ring_attention --devices -2 --case t8192",
            "--devices must be at least 2; got -2",
        ),
        ("run --op ring_attention --devices 1", "--devices must be at least 2; got 1"),
        (
            "run --op ring_attention --devices 4096 --tag ci",
            "error: --devices 4096 needs 4096 devices; there ",
        ),
        ("list --devices 0", "--devices must be at least 2; got 0"),
        ("list --op attention --devices 2", "attention runs on one device"),
        ("run --op add_rms_norm,atention --tag ci", "did you mean 'attention'?"),
        ("run --ops attention", "(perhaps you meant --op STR; see python -m bench run --help)"),
        ("run --repeats x", "error: --repeats must be an integer; got 'x' (see"),
        ("list --devices x", "error: --devices must be an integer; got 'x' (see"),
        ("lst", "unrecognized options: lst (see python -m bench --help)"),
        ("", "error: expected one of {run, list, tune, plot, tables}. (see python -m bench"),
    ],
)
def test_wrong_arguments_end_with_2_and_one_line(arguments, message, capsys):
    assert main(arguments.split()) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("error: ")
    assert "floor" not in shown.out, "the columns of what is measured"


def test_a_closed_pipe_ends_without_a_traceback():
    """As in `python -m bench list | head -1`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench", "list"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(timeout=120)
    assert err == ""
    assert process.returncode == 1


def test_whole_models_are_measured_beside_other_ops(capsys):
    """`--e2e` adds to `--op`: the first is looked at first."""
    assert main(["run", "--op", "flat_matmul", "--e2e", "decode", "--case", "nosuch"]) == 2
    assert "no case of flat_matmul" in capsys.readouterr().err


def run_small(*more: str) -> int:
    """Measure the smallest case of `add_rms_norm` with XLA."""
    arguments = "run --op add_rms_norm --tag ci --impl dispatch,xla --repeats 2 --commit 1234567"
    return main([*arguments.split(), "--case", "m1", *more])


def test_run_writes_rows_to_a_file(tmp_path, capsys):
    path = tmp_path / "out.json"
    assert run_small("--json", str(path)) == 0
    assert run_small("--json", str(path)) == 0
    saved = json.loads(path.read_text())
    assert [row["implementation"] for row in saved] == ["dispatch", "xla"], "replaced, not doubled"
    assert all(set(KEYS) <= set(row) for row in saved)
    assert {row["commit"] for row in saved} == {"1234567"}
    assert "dispatch (" in capsys.readouterr().out


def test_run_saves_under_the_device(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    assert run_small("--save") == 0
    (path,) = tmp_path.glob("*/add_rms_norm.json")
    assert {row["case"] for row in json.loads(path.read_text())} == {"ci m1 d128"}


def test_rows_without_a_commit_are_not_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.setattr(rows, "_first_line", lambda command: "1234567-dirty")
    assert run_small("--save", "--commit", "") == 2
    assert "changes without a commit" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_not_supported_is_no_failure(capsys):
    with use_device(CPU):
        assert run_small("--impl", "mosaic,xla") == 0
    shown = capsys.readouterr()
    assert "mosaic: not supported: add_rms_norm[mosaic] does not support device 'cpu'" in shown.err
    assert len(shown.out.splitlines()) == 3, "device, columns, the row of the other"


def test_a_run_without_any_row_is_a_failure(capsys):
    with use_device(CPU):
        assert run_small("--impl", "mosaic") == 1
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-1] == "error: nothing could be measured"
    assert len(shown.out.splitlines()) == 2, "device and columns, no row"


def test_list_by_devices_and_tag(capsys):
    assert main(["list", "--devices", "4", "--tag", "ci", "--op", "ring_attention"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("  ci n4 t36 causal ")
    assert main(["list", "--devices", "16"]) == 0, "they need not be there"
    out = capsys.readouterr().out
    assert "  llama-3-8b n16 t480 causal " in out
    assert "  llama-3-8b b1 s1024 " in out
    assert "  ci " not in out


def test_tables_check_says_what_is_out_of_date(monkeypatch, capsys):
    asked = []

    def update_all(*, write):
        asked.append(write)
        return [Path("README.md")]

    monkeypatch.setattr(tables, "update_all", update_all)
    assert main(["tables", "--check"]) == 1
    assert main(["tables"]) == 0
    assert asked == [False, True]
    assert capsys.readouterr().out == "README.md: out of date\nREADME.md: written\n"


def test_plot_prints_what_it_drew(monkeypatch, capsys):
    monkeypatch.setattr(plot, "plot_all", lambda op, out: [out / f"{op}.svg"])
    assert main(["plot", "--op", "attention", "--out", "pictures"]) == 0
    assert capsys.readouterr().out == "pictures/attention.svg\n"
