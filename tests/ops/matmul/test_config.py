"""Which tilings of `matmul` compete in tuning."""

import pytest

from jaxinfer.pallas_kernels.device import H100
from jaxinfer.pallas_kernels.matmul import config as configs
from jaxinfer.pallas_kernels.matmul.config import candidates, heuristic_config


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
