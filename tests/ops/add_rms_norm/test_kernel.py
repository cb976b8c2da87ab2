"""The Hopper kernel of `add_rms_norm`: simulated with race detection, and on the GPU."""

import jax.numpy as jnp
import pytest

from jaxinfer.pallas_kernels.add_rms_norm.mosaic_sm90 import vector_size
from jaxinfer.pallas_kernels.add_rms_norm.specs import SPECS, make_inputs
from tests.ops.add_rms_norm.calls import check, mosaic
from tests.ops.cases import cases, inputs, normal, same_bits


@pytest.mark.parametrize("spec", cases(SPECS, "ci"))
def test_matches_reference(hopper, spec):
    arrays = inputs(make_inputs, spec, 3)
    check(arrays, hopper.run(mosaic, *arrays))


@pytest.mark.gpu
@pytest.mark.parametrize("spec", cases(SPECS, "primary"))
def test_matches_reference_at_model_shapes(hopper_gpu, spec):
    arrays = inputs(make_inputs, spec, 4)
    check(arrays, hopper_gpu.run(mosaic, *arrays))


@pytest.mark.parametrize(("D", "width"), [(128, 1), (256, 2), (512, 4), (1024, 8), (16384, 8)])
def test_widths_of_a_load(hopper, D, width):
    assert vector_size(D) == width
    arrays = (normal(0, (1, D), "bfloat16"), None, normal(1, (D,), "bfloat16"))
    check(arrays, hopper.run(mosaic, *arrays))


def test_leading_dimensions_and_a_wide_weight(hopper):
    """Weights may stay in float32."""
    shape = (2, 1, 128)
    arrays = (normal(0, shape, "float16"), normal(1, shape, "float16"), normal(2, (128,)))
    check(arrays, hopper.run(mosaic, *arrays))


def test_eps_and_a_row_of_zeros(hopper):
    x = normal(0, (2, 128), "bfloat16").at[1].set(0)
    arrays = (x, jnp.zeros_like(x), normal(1, (128,), "bfloat16"))
    got = hopper.run(lambda *args: mosaic(*args, eps=0.5), *arrays)
    check(arrays, got, eps=0.5)
    assert not got[0][1].any()


def test_two_runs_give_equal_bits(hopper):
    arrays = inputs(make_inputs, SPECS[-3], 5)
    same_bits(hopper.run(mosaic, *arrays), hopper.run(mosaic, *arrays))
