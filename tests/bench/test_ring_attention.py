"""The benchmark over several devices, on those that XLA makes of a CPU."""

import json
import os
import re
import subprocess
import sys

import pytest

from bench.cases.ring_attention import cases
from bench.registry import cases_of
from jaxinfer.pallas_kernels.dispatch import NotSupported
from jaxinfer.sharding.sequence_parallel.ring import plan_for
from tests.paths import REPOSITORY


def test_rows_of_three_devices(tmp_path):
    """Every schedule and XLA against one device, then timed; three ranks have no xor schedule."""
    out = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench", "run", "--op", "ring_attention", "--tag", "ci",
         "--devices", "3", "--repeats", "2", "--json", str(out)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # every row is compiled, and runs a few times
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    absent = {"xor-all_to_all", "full_link-collective_group", "ring-cudnn", "full_link-all_to_all"}
    for name in absent:
        assert f"{name}: not supported" in done.stderr
    assert "3 devices, where it is hamilton-all_to_all" in done.stderr
    rows = {row["implementation"]: row for row in json.loads(out.read_text())}
    assert rows.keys() == set(cases(3)[0].implementations) - absent
    assert rows["dispatch"]["ran"] == cases(3)[-1].planned
    for row in rows.values():
        assert row["case"] == "ci n3 t24 causal"
        assert row["devices"] == 3
        assert row["tokens_per_s"] == pytest.approx(3 * 24 * 1e6 / row["median_us"], rel=0.01)
        alone = {"communication_us", "computation_us", "overlap"} & row.keys()
        assert len(alone) == 3
        gain = rows["ring"]["median_us"] / row["median_us"]
        assert row["gain_over_ring"] == pytest.approx(gain, rel=0.01)
        gain = rows["xla-all_gather"]["median_us"] / row["median_us"]
        assert row["gain_over_xla"] == pytest.approx(gain, rel=0.01)
    lines = done.stdout.splitlines()[2:]
    assert len(lines) == 2 * len(rows), "a row, and below it what it has no column for"
    for above, below in zip(lines[::2], lines[1::2], strict=True):
        assert above.startswith("ci n3 t24 causal ")
        assert re.fullmatch(
            r"  communication \S+ µs, computation \S+ µs, overlap -?\d+%; "
            r"\d+\.\d\dx as fast as the ring, \d+\.\d\dx as XLA's all-gather",
            below,
        )
    ran = rows["dispatch"]["ran"]
    assert ran not in rows or rows["dispatch"]["median_us"] == rows[ran]["median_us"]


@pytest.mark.parametrize("n", range(2, 9))
def test_what_the_cost_model_takes_can_be_timed(n):
    """Also a way that has no row of its own."""
    for case in cases(n):
        way = case.way(case.planned)
        found = way.schedule(n, case.K)
        assert found.num_ranks == n
        chosen = plan_for(
            n, (1, case.T, case.N, case.H), case.K, 4, schedule=None, transport=None,
            topology=None, placement=case.placement, is_causal=case.is_causal,
        )  # fmt: skip
        assert (found.name, way.transport) == (chosen.schedule.name, chosen.transport)
        assert found.pieces_per_rank == chosen.schedule.pieces_per_rank


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
def test_every_schedule_can_cut_the_tokens_of_a_case(n):
    known = cases(n)
    assert all(case.T % (2 * (n - 1)) == 0 for case in known)
    totals = {n * case.T for case in known if case.tag == "primary"}
    for tokens, wanted in zip(sorted(totals), (2**13, 2**15, 2**17), strict=True):
        assert 0.85 * wanted < tokens <= wanted


def test_one_device_is_not_enough():
    case = cases(1)[0]
    with pytest.raises(NotSupported, match="2 or more"):
        case.measure("ring", repeats=1)


def test_counts_are_of_one_device():
    causal, full = cases(2)[:2]
    assert full.flops == 2 * causal.flops == 4 * 2 * 4096**2 * 32 * 128
    assert causal.name == "llama-3-8b n2 t4096 causal"


def test_devices_are_for_this_op_only():
    assert cases_of("ring_attention", devices=4)[0].name.split()[1] == "n4"
    with pytest.raises(ValueError, match="attention runs on one device"):
        cases_of("attention", devices=2)
