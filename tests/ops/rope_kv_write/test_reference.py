"""The reference of `rope_kv_write` against complex numbers in float64."""

import dataclasses

import jax.numpy as jnp
import pytest

from jaxinfer.pallas_kernels.rope_kv_write.reference import rotate_half
from jaxinfer.pallas_kernels.rope_kv_write.specs import SPECS, make_inputs
from tests.metrics import assert_dtype_close
from tests.ops import oracle
from tests.ops.cases import cases, inputs, normal
from tests.ops.rope_kv_write.calls import (
    STRAY_SLOTS,
    STRAYS,
    astray,
    call_reference,
    changed_slots,
    check,
)


@pytest.mark.parametrize("spec", cases(SPECS, "ci"))
def test_matches_float64(spec):
    spec = dataclasses.replace(spec, dtype="float32")
    arrays = inputs(make_inputs, spec, 1)
    check(spec, call_reference(*arrays), oracle.rope_kv_write(*arrays))


def test_tokens_outside_the_table_or_the_pool_are_written_nowhere():
    """What exists is told from what does not in plain Python."""
    arrays = astray(inputs(make_inputs, STRAYS, 2))
    got = call_reference(*arrays)
    for pool, before in zip(got[2:], arrays[5:7], strict=True):
        assert changed_slots(pool, before) == STRAY_SLOTS


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    """q at m and k at n meet as if q were at m - n and k at 0."""
    q, k = normal(0, (1, 1, 1, 8)), normal(1, (1, 1, 1, 8))
    frequency = jnp.array([1.0, 0.3, 0.1, 0.01])

    def at(x, position):
        angle = position * frequency[None, None]
        return rotate_half(x, jnp.cos(angle), jnp.sin(angle))

    assert_dtype_close(jnp.linalg.norm(at(q, 7.0)), jnp.linalg.norm(q), "float32")
    far, near = (at(q, 19.0) * at(k, 14.0)).sum(), (at(q, 5.0) * k).sum()
    assert_dtype_close(far, near, "float32")
