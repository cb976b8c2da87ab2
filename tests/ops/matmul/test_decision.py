"""Which implementation measured times speak for, and which tilings compete."""

import dataclasses

import pytest

from jaxinfer.pallas_kernels.device import H100
from jaxinfer.pallas_kernels.matmul import config as configs
from jaxinfer.pallas_kernels.matmul.config import candidates, heuristic_config
from jaxinfer.pallas_kernels.matmul.decision import decide
from jaxinfer.pallas_kernels.matmul.mosaic_sm90 import Config

SLOW, FAST = Config(block_n=64), Config(block_n=128)


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


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("M", configs.BUCKETS)
@pytest.mark.parametrize(("K", "N"), [(4096, 6144), (576, 1152), (14336, 4096), (576, 3072)])
def test_the_heuristics_tiling_competes(M, K, N, gated):
    found = candidates(H100, M=M, K=K, N=N, gated=gated)
    assert heuristic_config(H100, M=M, K=K, N=N, gated=gated) in found
    assert len(set(found)) == len(found)
    for config in found:
        configs.check_fits(config, H100, M=M, gated=gated)


def test_no_tiling_for_sizes_that_the_kernel_lacks():
    assert candidates(H100, M=8, K=96, N=128, gated=False) == []
    assert candidates(H100, M=8, K=128, N=96, gated=False) == []
