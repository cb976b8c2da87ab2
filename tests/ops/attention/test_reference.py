"""The float32 reference of `attention` against an independent float64 one."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.pallas_kernels.attention.mask import Visibility
from jaxinfer.pallas_kernels.attention.reference import attention_reference
from jaxinfer.pallas_kernels.attention.specs import SPECS, make_inputs
from tests.metrics import assert_dtype_close
from tests.ops import oracle
from tests.ops.attention.calls import call_reference
from tests.ops.cases import cases, inputs, normal


@pytest.mark.parametrize("spec", cases(SPECS, "ci"))
def test_matches_float64(spec):
    arrays = inputs(make_inputs, spec, 1)
    want = oracle.attention(*arrays, **spec.options)
    got = call_reference(spec, arrays)
    for one, expected, label in zip(got, want, ("out", "lse"), strict=True):
        assert_dtype_close(one, expected, "float32", label)


def test_visibility_reads_like_its_definition():
    """Every rule at once, token by token."""
    rule = Visibility(
        is_causal=False, left=2, right=1, q_offset=jnp.array([0, 3]),
        query_lengths=jnp.array([4, 2]), key_lengths=jnp.array([5, 6]),
    )  # fmt: skip
    got = np.asarray(rule.mask(jnp.arange(4), jnp.arange(7)))
    for b, (offset, queries, keys) in enumerate(((0, 4, 5), (3, 2, 6))):
        for t in range(4):
            for j in range(7):
                near = offset + t - 2 <= j <= offset + t + 1
                assert got[b, t, j] == (near and t < queries and j < keys), (b, t, j)


def test_huge_logits_stay_finite():
    """Logits of ±1e4 leave one key with all the weight."""
    query = jnp.full((1, 1, 1, 4), 100.0)
    key = jnp.stack([jnp.full((4,), 100.0), jnp.full((4,), -100.0)])[None, :, None]
    value = normal(0, (1, 2, 1, 4))
    rule = Visibility(
        is_causal=False, left=None, right=None, q_offset=jnp.array([0]),
        query_lengths=None, key_lengths=None,
    )  # fmt: skip
    out, lse = attention_reference(query, key, value, rule, scale=1.0)
    np.testing.assert_array_equal(out[0, 0, 0], value[0, 0, 0])
    assert float(lse[0, 0, 0]) == 4e4
