"""Every spec of `add_rms_norm` lowers for an H100, on any machine."""

import pytest

from jaxinfer.pallas_kernels import plgpu
from jaxinfer.pallas_kernels.add_rms_norm.specs import SPECS, NormSpec, make_inputs
from tests.ops.add_rms_norm.calls import mosaic
from tests.ops.cases import cases, shapes_of


@pytest.mark.parametrize("spec", cases(SPECS))
def test_lowers(h100, spec):
    shapes = shapes_of(make_inputs, spec)
    text = plgpu.lower_for_cuda(mosaic, *shapes, spec=h100)
    assert text.count("custom_call @mosaic_gpu") == 1


def test_the_widest_row_lowers(h100):
    spec = NormSpec(model="wide", M=2, D=16384)
    plgpu.lower_for_cuda(mosaic, *shapes_of(make_inputs, spec), spec=h100)
