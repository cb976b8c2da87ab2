"""Rows: what they hold, and how files keep them."""

import json
import os

import pytest

from bench.case import Measurement
from bench.registry import cases_of, select
from bench.rows import Machine, load, make_row, results_of, save
from jaxinfer.pallas_kernels.device import H100, use_device
from tests.bench.fakes import MACHINE, FakeCase, row

KEYS = [
    "op", "case", "implementation", "median_us", "iqr_us", "tflops", "gbps", "floor_us",
    "floor_share", "rel_rms", "compile_s", "device", "driver", "jax", "commit", "date",
]  # fmt: skip


def test_a_real_row_has_all_keys():
    case = select(cases_of("add_rms_norm"), tag="ci", words=["m1"])[0]
    made = make_row("add_rms_norm", case, "dispatch", case.measure("dispatch", repeats=3), MACHINE)
    assert list(made) == [*KEYS, "ran"]
    assert made["ran"] in ("xla", "mosaic")
    assert made["median_us"] > 0
    assert made["compile_s"] > 0
    assert 0 <= made["rel_rms"] < 6e-3
    assert json.loads(json.dumps(made)) == made


def test_rates_and_floor_come_from_the_counts_of_the_case():
    measured = Measurement(
        median_us=10.0, iqr_us=1.0, rel_rms=0.0, compile_s=0.0, extra={"tokens_per_s": 123.456}
    )
    with use_device(H100):
        made = make_row("op", FakeCase({}), "x", measured, MACHINE)
    assert made["tflops"] == pytest.approx(2e6 / 10e-6 / 1e12)
    assert made["gbps"] == pytest.approx(1e6 / 10e-6 / 1e9)
    assert made["floor_us"] == pytest.approx(1e6 / H100.read_gbps / 1e3, rel=1e-3)
    assert made["floor_share"] == pytest.approx(made["floor_us"] / 10, rel=1e-3)
    assert made["tokens_per_s"] == 123.5
    assert "ran" not in made


def test_median_and_interquartile_range():
    measured = Measurement.of([4.0, 1.0, 2.0, 3.0, 5.0], rel_rms=0.0, compile_s=0.0)
    assert (measured.median_us, measured.iqr_us) == (3.0, 2.0)


def test_save_replaces_rows_of_the_same_identity(tmp_path):
    path = tmp_path / "device" / "op.json"
    save(path, [row("a", "xla", 1.0), row("a", "mosaic", 2.0)])
    save(path, [row("a", "xla", 3.0), row("b", "xla", 4.0)])
    held = {(r["case"], r["implementation"]): r["median_us"] for r in load(path)}
    assert held == {("a", "xla"): 3.0, ("a", "mosaic"): 2.0, ("b", "xla"): 4.0}
    assert next(iter(held)) == ("a", "xla"), "a row keeps its place"
    assert [file.name for file in path.parent.iterdir()] == ["op.json"]


def test_load_of_no_file_is_no_rows(tmp_path):
    assert load(tmp_path / "none.json") == []


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "op.json"
    save(path, [row("a", "xla", 1.0)])
    before = path.read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(path, [row("a", "xla", 2.0)])
    assert path.read_bytes() == before


def test_results_lie_in_the_folder_of_the_device():
    assert results_of(H100, "attention").parts[-4:] == (
        "bench", "results", "nvidia_h100_80gb_hbm3", "attention.json",
    )  # fmt: skip


def test_machine_takes_the_commit_it_is_given():
    machine = Machine.here("1234567")
    assert machine.commit == "1234567"
    assert machine.jax
    assert machine.device


def test_machine_without_git_says_unknown(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Machine.here().commit == "unknown"
