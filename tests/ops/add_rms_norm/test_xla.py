"""`add_rms_norm` in plain JAX."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.pallas_kernels.add_rms_norm.specs import SPECS, make_inputs
from tests.metrics import assert_dtype_close
from tests.ops.add_rms_norm.calls import check, xla
from tests.ops.cases import cases, inputs, normal, same_bits


@pytest.mark.parametrize("spec", cases(SPECS, "ci"))
def test_matches_reference(spec):
    arrays = inputs(make_inputs, spec, 2)
    check(arrays, xla(*arrays))


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 1), (2, 3, 5)], ids=str)
def test_odd_shapes(shape):
    """A single row, a single column, several leading dimensions."""
    arrays = (normal(0, shape), normal(1, shape), normal(2, shape[-1:]))
    check(arrays, xla(*arrays))


@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_scale_does_not_matter(size):
    """Squares of such numbers stay within float32."""
    x, weight = normal(0, (2, 64)), normal(1, (64,))
    big, total = xla(x * size, x * size, weight, eps=0.0)
    assert_dtype_close(big, xla(x, x, weight, eps=0.0)[0], "float32")
    same_bits(total, x * size + x * size)


def test_without_residual_the_sum_is_the_input():
    x, weight = normal(0, (3, 16), "bfloat16"), normal(1, (16,), "bfloat16")
    normed, total = xla(x, None, weight)
    same_bits(total, x)
    same_bits(normed, xla(x, jnp.zeros_like(x), weight)[0])


def test_rows_do_not_meet():
    x, weight = normal(0, (3, 16)), normal(1, (16,))
    dirty, _ = xla(x.at[1].set(jnp.nan), None, weight)
    np.testing.assert_array_equal(np.isnan(dirty).any(axis=1), [False, True, False])
    same_bits(dirty[::2], xla(x, None, weight)[0][::2])
