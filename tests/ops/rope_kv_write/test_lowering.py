"""Every spec of `rope_kv_write` lowers for an H100, and aliases its pools."""

import functools

import jax
import pytest

from jaxinfer.pallas_kernels import plgpu
from jaxinfer.pallas_kernels.rope_kv_write.api import rope_kv_write
from jaxinfer.pallas_kernels.rope_kv_write.specs import SPECS, RopeWriteSpec, make_inputs
from tests.ops.cases import cases, shapes_of

mosaic = functools.partial(rope_kv_write, implementation="mosaic")


@pytest.mark.parametrize("spec", cases(SPECS))
def test_lowers(h100, spec):
    text = plgpu.lower_for_cuda(mosaic, *shapes_of(make_inputs, spec), spec=h100)
    assert text.count("custom_call @mosaic_gpu") == 1
    assert "output_operand_aliases" in text, "the pools are not updated in place"


@pytest.mark.parametrize("page_size", [1, 16, 48, 256])
def test_page_sizes(h100, page_size):
    spec = RopeWriteSpec(model="pages", B=1, T=2, N=3, K=1, H=64, page_size=page_size)
    plgpu.lower_for_cuda(mosaic, *shapes_of(make_inputs, spec), spec=h100)


def test_angles_may_be_narrow(h100):
    """cos and sin in the dtype of the model."""
    spec = RopeWriteSpec(model="angles", B=1, T=2, N=3, K=1, H=64)
    shapes = list(shapes_of(make_inputs, spec))
    shapes[3] = shapes[4] = jax.ShapeDtypeStruct(shapes[3].shape, "bfloat16")
    plgpu.lower_for_cuda(mosaic, *shapes, spec=h100)
