"""The benchmark over several devices, on those that XLA makes of a CPU."""

import json
import os
import subprocess
import sys

import pytest

from bench.cases.ring_attention import cases
from bench.registry import cases_of
from jaxinfer.pallas_kernels.dispatch import NotSupported
from tests.paths import REPOSITORY


def test_rows_of_three_devices(tmp_path):
    """Every schedule and XLA against one device, then timed; three ranks have no xor schedule."""
    out = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench", "run", "--op", "ring_attention", "--tag", "ci",
         "--devices", "3", "--repeats", "2", "--json", str(out)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "xor-all_to_all: not supported" in done.stderr
    rows = {row["implementation"]: row for row in json.loads(out.read_text())}
    assert "full_link-collective_group: not supported" in done.stderr
    absent = {"xor-all_to_all", "full_link-collective_group"}
    assert rows.keys() == set(cases(3)[0].implementations) - absent
    for name, row in rows.items():
        assert row["case"] == "ci n3 t24 causal"
        assert row["tokens_per_s"] == pytest.approx(3 * 24 * 1e6 / row["median_us"], rel=0.01)
        alone = {"communication_us", "computation_us", "overlap"} & row.keys()
        assert len(alone) == (3 if name.split("-")[0] in {"ring", "hamilton", "full_link"} else 0)


def test_one_device_is_not_enough():
    case = cases(1)[0]
    with pytest.raises(NotSupported, match="2 or more"):
        case.measure("ring", repeats=1)


def test_counts_are_of_one_device():
    causal, full = cases(4)[:2]
    assert full.flops == 2 * causal.flops == 4 * 4 * 4096**2 * 32 * 128
    assert causal.name == "llama-3-8b n4 t4096 causal"


def test_devices_are_for_this_op_only():
    assert cases_of("ring_attention", devices=4)[0].name.split()[1] == "n4"
    with pytest.raises(ValueError, match="attention runs on one device"):
        cases_of("attention", devices=2)
