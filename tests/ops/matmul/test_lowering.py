"""Every spec of `matmul` lowers for an H100, on any machine."""

import dataclasses

import pytest

from jaxinfer.pallas_kernels import plgpu
from jaxinfer.pallas_kernels.matmul.specs import SPECS, make_inputs
from tests.ops.cases import cases, shapes_of
from tests.ops.matmul.calls import call


@pytest.mark.parametrize("spec", cases(SPECS))
def test_lowers(h100, spec):
    text = plgpu.lower_for_cuda(call(spec, "mosaic"), *shapes_of(make_inputs, spec), spec=h100)
    assert text.count("custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize("spec", cases(SPECS, "primary"))
def test_a_residual_fits_beside_every_choice(h100, spec):
    """The ring gives way where it filled the shared memory."""
    spec = dataclasses.replace(spec, residual=True)
    plgpu.lower_for_cuda(call(spec, "mosaic"), *shapes_of(make_inputs, spec), spec=h100)
