"""The Hopper kernel of `matmul`: simulated with race detection, and on the GPU."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.pallas_kernels.matmul.api import matmul
from jaxinfer.pallas_kernels.matmul.shape import Config, num_ctas
from jaxinfer.pallas_kernels.matmul.specs import SPECS, MatmulSpec, make_inputs
from tests.ops.cases import cases, inputs, normal, same_bits
from tests.ops.matmul.calls import call, check

SMALL = Config(block_n=64, block_k=64, stages=2)
PAIRED = Config(block_n=64, block_k=64, stages=2, cluster=2)
HALVED = Config(block_n=64, block_k=64, stages=2, split=2)
QUARTERED = Config(block_n=64, block_k=64, stages=2, split=4)


def run(hopper, spec, seed=4, num_sms=2, **more):
    arrays = inputs(make_inputs, spec, seed)
    return arrays, hopper.run(call(spec, "mosaic", **more), *arrays, num_sms=num_sms)


@pytest.mark.parametrize("spec", cases(SPECS, "ci"))
def test_matches_reference(hopper, spec):
    check(spec, *run(hopper, spec))


@pytest.mark.parametrize("config", [SMALL, PAIRED], ids=["single", "paired"])
@pytest.mark.parametrize(("tiles", "num_sms"), [(1, 2), (2, 2), (3, 2), (5, 4)])
def test_tiles_that_do_not_fill_the_ctas(hopper, tiles, num_sms, config):
    """More stages than a ring holds, and CTAs of a pair that have no tile of their own."""
    spec = MatmulSpec(model="tiles", M=8, K=192, N=64 * tiles)
    check(spec, *run(hopper, spec, num_sms=num_sms, config=config))


@pytest.mark.parametrize("config", [HALVED, QUARTERED], ids=["halved", "quartered"])
@pytest.mark.parametrize("spec", [
    MatmulSpec(model="split", M=1, K=256, N=64),
    MatmulSpec(model="split", M=8, K=704, N=192, bias=True, residual=True),  # unequal parts
    MatmulSpec(model="split", M=12, K=256, N=256, gate="silu", bias=True),
    MatmulSpec(model="split", M=24, K=320, N=64, dtype="float16"),
    MatmulSpec(model="split", M=16, K=256, N=128, transposed=True),
], ids=lambda spec: spec.name)  # fmt: skip
def test_ctas_that_share_the_depth_of_a_tile(hopper, spec, config):
    check(spec, *run(hopper, spec, num_sms=4, config=config))


@pytest.mark.gpu
@pytest.mark.parametrize("split", [2, 4, 8])
@pytest.mark.parametrize("gate", [None, "silu"])
@pytest.mark.parametrize("M", [1, 24])
def test_ctas_that_share_the_depth_on_a_gpu(hopper_gpu, M, gate, split):
    """The stores to another CTA's shared memory, which the interpreter does without."""
    spec = MatmulSpec(model="split", M=M, K=64 * (4 * split + 3), N=512, gate=gate, residual=True)
    config = Config(block_n=64, block_k=64, stages=3, split=split)
    check(spec, *run(hopper_gpu, spec, num_sms=0, config=config))


def test_shared_depth_gives_equal_bits(hopper):
    """The first CTA adds what the others send in their order, not as it comes."""
    spec = MatmulSpec(model="split", M=8, K=512, N=128)
    runs = [run(hopper, spec, num_sms=8, config=QUARTERED)[1] for _ in range(2)]
    same_bits(*runs)


@pytest.mark.parametrize("M", [1, 7, 9, 24, 128])
def test_numbers_of_tokens(hopper, M):
    spec = MatmulSpec(model="tokens", M=M, K=64, N=128)
    check(spec, *run(hopper, spec, config=SMALL))


@pytest.mark.gpu
@pytest.mark.parametrize("spec", cases(SPECS, "primary"))
def test_matches_reference_at_model_shapes(hopper_gpu, spec):
    check(spec, *run(hopper_gpu, spec, num_sms=0))


def test_leading_dimensions(hopper):
    x, weight = normal(0, (2, 3, 64), "bfloat16"), normal(1, (64, 64), "bfloat16", 0.1)
    kernel = functools.partial(matmul, implementation="mosaic", config=SMALL)
    got = hopper.run(kernel, x, weight)
    assert got.shape == (2, 3, 64)
    same_bits(got.reshape(6, 64), hopper.run(kernel, x.reshape(6, 64), weight))


def test_rows_do_not_see_each_other(hopper):
    """NaN in one token changes no bit of another, though they share a tile."""
    x, weight = normal(0, (8, 64), "bfloat16"), normal(1, (64, 64), "bfloat16", 0.1)
    kernel = functools.partial(matmul, implementation="mosaic", config=SMALL)
    clean = hopper.run(kernel, x, weight)
    dirty = hopper.run(kernel, x.at[3].set(jnp.nan), weight)
    others = np.arange(8) != 3
    same_bits(dirty[others], clean[others])
    assert np.isnan(dirty[3]).all()


def test_two_runs_give_equal_bits(hopper):
    spec = SPECS[-3]
    same_bits(run(hopper, spec)[1], run(hopper, spec)[1])


@pytest.mark.parametrize(("tiles", "num_sms", "cluster", "ctas"), [
    (1, 132, 1, 1), (132, 132, 1, 132), (133, 132, 1, 67), (224, 132, 1, 112), (224, 132, 2, 112),
    (3, 132, 2, 4), (5, 2, 2, 2),
])  # fmt: skip
def test_ctas_have_equal_shares(tiles, num_sms, cluster, ctas):
    assert num_ctas(tiles, num_sms=num_sms, cluster=cluster) == ctas
