"""Which implementation measured times speak for, and what is read of an entry."""

import dataclasses
import json

import pytest

from jaxinfer.pallas_kernels.decision import Preference, decide, parse
from jaxinfer.pallas_kernels.decode_attention import shape as decode_attention
from jaxinfer.pallas_kernels.matmul import shape as matmul


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Of some kernel."""

    block: int = 64
    stages: int = 2


SLOW, FAST, OTHER = Tiling(64), Tiling(128), Tiling(32)


@pytest.mark.parametrize(
    ("fastest_us", "implementation"),
    [(90.0, "mosaic"), (98.9, "mosaic"), (99.1, "xla"), (100.0, "xla"), (110.0, "xla")],
)
def test_the_kernel_must_win_by_more_than_noise(fastest_us, implementation):
    entry = decide(100.0, {SLOW: 120.0, FAST: fastest_us})
    assert entry["implementation"] == implementation
    assert entry["config"] == dataclasses.asdict(FAST)
    assert entry["us"] == {"xla": 100.0, "mosaic": fastest_us}


def test_without_a_kernel_there_is_xla():
    assert decide(12.3456, {}) == {"implementation": "xla", "us": {"xla": 12.35}}


def read(entry, check=lambda tiling: None):
    return parse(entry, Tiling, default=OTHER, check=check)


def test_what_it_must_save_besides():
    times = {FAST: 95.0}
    chosen = [decide(100.0, times, least_gain_us=gain)["implementation"] for gain in (3.9, 4.1)]
    assert chosen == ["mosaic", "xla"]
    slower = [decide(4.5, {FAST: us}, least_gain_us=-1.0)["implementation"] for us in (5.4, 5.5)]
    assert slower == ["mosaic", "xla"]


def test_what_was_decided_is_read():
    assert read(decide(100.0, {SLOW: 120.0, FAST: 90.0})) == Preference(
        order=("mosaic", "xla"), config=FAST, slower_us=-10.0
    )
    assert read(decide(100.0, {SLOW: 120.0})) == Preference(
        order=("xla",), config=SLOW, slower_us=20.0
    )
    assert read(decide(100.0, {})) == Preference(order=("xla",), config=OTHER)


@pytest.mark.parametrize("config", [matmul.Config(stages=7), decode_attention.Config(block=128)])
def test_tilings_of_the_kernels_come_back(config):
    entry = json.loads(json.dumps(decide(100.0, {config: 90.0})))
    made = parse(entry, type(config), default=None, check=lambda tiling: None)
    assert made.config == config


@pytest.mark.parametrize(("entry", "error"), [
    ({}, KeyError),
    ({"implementation": "triton"}, ValueError),
    ({"implementation": ["mosaic"]}, ValueError),
    ({"implementation": "mosaic", "config": {"blocks": 64}}, TypeError),
    ({"implementation": "mosaic", "config": {"block": 64.0}}, TypeError),
    ({"implementation": "mosaic", "config": {"block": True}}, TypeError),
    ({"implementation": "mosaic", "config": [64, 2]}, TypeError),
    ({"implementation": "mosaic", "us": {"xla": None, "mosaic": 1.0}}, TypeError),
], ids=str)  # fmt: skip
def test_what_cannot_be_used_is_refused(entry, error):
    with pytest.raises(error):
        read(entry)


def test_a_tiling_that_does_not_suit_the_call_is_refused():
    def check(tiling):
        raise ValueError(f"{tiling} is too large")

    with pytest.raises(ValueError, match=r"stages=2.* is too large"):
        read(decide(100.0, {FAST: 90.0}), check)
