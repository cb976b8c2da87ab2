"""`matmul` lowers for an H100, on any machine: specs, tilings and numbers of tokens."""

import dataclasses

import jax
import pytest

from jaxinfer.pallas_kernels import plgpu
from jaxinfer.pallas_kernels.matmul.config import GRID, candidates, deepest, heuristic_config
from jaxinfer.pallas_kernels.matmul.specs import SPECS, MatmulSpec, make_inputs
from tests.ops.cases import cases, shapes_of
from tests.ops.matmul.calls import call


@pytest.mark.parametrize("spec", cases(SPECS, "ci", "primary"))
def test_lowers(h100, spec):
    text = plgpu.lower_for_cuda(call(spec, "mosaic"), *shapes_of(make_inputs, spec), spec=h100)
    assert text.count("custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize("M", range(4, 129, 8))
def test_every_number_of_tokens_lowers(h100, M):
    """What the heuristic takes for a gated and a plain product; tokens of pairs are cut in two."""
    for gate in (None, "silu"):
        spec = MatmulSpec(model="any", M=M, K=4096, N=2 * 11_008 if gate else 8192, gate=gate)
        plgpu.lower_for_cuda(call(spec, "mosaic"), *shapes_of(make_inputs, spec), spec=h100)


@pytest.mark.parametrize("M", [4, 20, 124])
@pytest.mark.parametrize("tiling", GRID, ids=lambda tiling: tiling.name)
def test_every_tiling_of_the_grid_lowers(h100, tiling, M):
    for gate in (None, "silu"):
        config = deepest(h100, tiling, M=M, gated=gate is not None)
        if config is None:
            assert tiling.block_n == 128 or tiling.split * M > 200, "narrow tiles fit"
            continue
        spec = MatmulSpec(model="any", M=M, K=1024, N=2048, gate=gate)
        lower = call(spec, "mosaic", config=config)
        plgpu.lower_for_cuda(lower, *shapes_of(make_inputs, spec), spec=h100)


@pytest.mark.parametrize("M", [1, 64, 72, 80, 96, 128])
@pytest.mark.parametrize("gated", [False, True])
def test_sums_fit_the_registers(h100, M, gated):
    """A thread has 232, and needs some for addresses and the squares of a norm."""
    for config in candidates(h100, M=M, K=4096, N=28_672, gated=gated):
        assert config.accumulators(M, gated=gated) + config.rows(M) // 2 <= 192
    heuristic = heuristic_config(h100, M=M, K=4096, N=28_672, gated=gated)
    assert heuristic in candidates(h100, M=M, K=4096, N=28_672, gated=gated)


@pytest.mark.parametrize("spec", cases(SPECS, "primary"))
def test_a_residual_fits_beside_every_choice(h100, spec):
    """The ring gives way where it filled the shared memory."""
    spec = dataclasses.replace(spec, residual=True)
    plgpu.lower_for_cuda(call(spec, "mosaic"), *shapes_of(make_inputs, spec), spec=h100)


def test_lowers_where_integers_have_64_bits(h100):
    spec = next(spec for spec in SPECS if spec.M == 8)
    with jax.enable_x64(True):
        plgpu.lower_for_cuda(call(spec, "mosaic"), *shapes_of(make_inputs, spec), spec=h100)
