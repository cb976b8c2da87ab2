"""The float32 reference of `decode_attention` against an independent float64 one."""

import pytest

from jaxinfer.pallas_kernels.decode_attention.specs import SPECS, make_inputs
from tests.metrics import assert_dtype_close
from tests.ops import oracle
from tests.ops.cases import cases, inputs
from tests.ops.decode_attention.calls import call_reference


@pytest.mark.parametrize("spec", cases(SPECS, "ci"))
def test_matches_float64(spec):
    arrays = inputs(make_inputs, spec, 1)
    want = oracle.decode_attention(*arrays, **spec.options)
    got = call_reference(spec, arrays)
    for one, expected, label in zip(got, want, ("out", "lse"), strict=True):
        assert_dtype_close(one, expected, "float32", label)
