"""Which tilings of `matmul` compete in tuning."""

import pytest

from jaxinfer.pallas_kernels import tuning
from jaxinfer.pallas_kernels.device import H100, H200
from jaxinfer.pallas_kernels.matmul import config as configs
from jaxinfer.pallas_kernels.matmul.config import candidates, heuristic_config
from jaxinfer.pallas_kernels.matmul.shape import Config


@pytest.mark.parametrize("cast", [False, True], ids=["16 bits", "float32"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("M", configs.BUCKETS)
@pytest.mark.parametrize(
    ("K", "N"), [(4096, 6144), (576, 1152), (14336, 4096), (576, 3072), (4096, 128_256)]
)
def test_the_heuristics_tiling_competes(M, K, N, gated, cast):
    found = candidates(H100, M=M, K=K, N=N, gated=gated, cast=cast)
    assert heuristic_config(H100, M=M, K=K, N=N, gated=gated, cast=cast) in found
    assert len(set(found)) == len(found)
    for config in found:
        configs.check_fits(config, H100, M=M, gated=gated, tiles=1 + cast)


def test_sums_must_leave_registers():
    config = Config(block_n=128, block_k=64, stages=2)
    with pytest.raises(ValueError, match=r"sums may take 144 of a thread; .* take 256 for 128 to"):
        configs.check_fits(config, H100, M=128, gated=True)


def test_no_tiling_for_sizes_that_the_kernel_lacks():
    assert candidates(H100, M=8, K=96, N=128, gated=False) == []
    assert candidates(H100, M=8, K=128, N=96, gated=False) == []


@pytest.mark.parametrize(("changes", "problem"), [
    ({"block_n": 128}, "960 columns"), ({"block_k": 512}, "K = 576"),
    ({"block_k": 64, "split": 16}, "split must be"), ({"block_k": 192, "split": 4}, "leave steps"),
], ids=["columns", "depth", "split", "steps"])  # fmt: skip
def test_an_entry_that_does_not_suit_its_product_is_a_warning(
    tmp_path, monkeypatch, caplog, changes, problem
):
    monkeypatch.setenv("JAXINFER_TUNING", str(tmp_path))
    sizes = {"M": 1, "K": 576, "N": 960, "gated": False, "transposed": False}
    before = configs.choose_config(H200, **sizes)
    config = {"block_n": 64, "block_k": 64, "stages": 4} | changes
    entry = {"implementation": "mosaic", "config": config, "us": {"xla": 9.0, "mosaic": 1.0}}
    tuning.save(tmp_path, "matmul", H200, {configs.key(**sizes): entry}, "by hand")
    assert configs.choose_config(H200, **sizes) == before
    (message,) = caplog.messages
    assert problem in message
    assert str(tmp_path) in message


def test_a_time_that_no_float_holds_is_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("JAXINFER_TUNING", str(tmp_path))
    sizes = {"M": 1, "K": 576, "N": 960, "gated": False, "transposed": False}
    entry = {"implementation": "xla", "us": {"xla": 1, "mosaic": 10**400}}
    tuning.save(tmp_path, "matmul", H200, {configs.key(**sizes): entry}, "by hand")
    configs.choose_config(H200, **sizes)
    assert "OverflowError" in caplog.text
