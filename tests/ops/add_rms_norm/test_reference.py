"""The reference of `add_rms_norm` against float64."""

import dataclasses

import jax.numpy as jnp
import pytest

from jaxinfer.pallas_kernels.add_rms_norm.reference import add_rms_norm_reference
from jaxinfer.pallas_kernels.add_rms_norm.specs import SPECS, make_inputs
from tests.metrics import assert_dtype_close
from tests.ops import oracle
from tests.ops.cases import cases, inputs, normal


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-2])
@pytest.mark.parametrize("spec", cases(SPECS, "ci"))
def test_matches_float64(spec, eps):
    arrays = inputs(make_inputs, dataclasses.replace(spec, dtype="float32"), 1)
    got = add_rms_norm_reference(*arrays, eps=eps)
    want = oracle.add_rms_norm(*arrays, eps=eps)
    for one, expected, label in zip(got, want, ("normed", "total"), strict=True):
        assert_dtype_close(one, expected, "float32", label)


def test_eps_carries_a_row_of_zeros():
    x = jnp.zeros((1, 8))
    normed, _ = add_rms_norm_reference(x, x, normal(0, (8,)), eps=1e-6)
    assert not normed.any()
