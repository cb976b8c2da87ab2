"""Corners of `merge_attention`; that parts merge to the whole is in `test_properties.py`."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.pallas_kernels.attention.merge import merge_attention
from tests.metrics import assert_close, assert_dtype_close
from tests.ops.cases import normal, same_bits


def part(seed, lse=None, dtype="float32"):
    """Output `[2, 3, 4]` with random log-sum-exps, or one for all."""
    lses = normal(seed + 100, (2, 3)) if lse is None else jnp.full((2, 3), lse)
    return normal(seed, (2, 3, 4), dtype), lses


def test_no_parts_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        merge_attention([])


def test_one_part_is_itself():
    out, lse = part(0)
    same_bits(merge_attention([(out, lse)])[1], lse)
    assert_dtype_close(merge_attention([(out, lse)])[0], out, "float32")


def test_a_part_that_saw_nothing_changes_nothing():
    some, nothing = part(0), part(1, -np.inf)
    for parts in ([some, nothing], [nothing, some]):
        same_bits(merge_attention(parts), merge_attention([some]))


def test_parts_that_all_saw_nothing_give_zeros():
    out, lse = merge_attention([part(0, -np.inf), part(1, -np.inf)])
    same_bits(out, jnp.zeros_like(out))
    assert np.isneginf(lse).all()


def test_rows_decide_for_themselves():
    """One row of a part saw nothing, the others did."""
    first, second = part(0), part(1)
    hole = (first[0], first[1].at[0, 0].set(-jnp.inf))
    out, lse = merge_attention([hole, second])
    same_bits((out[0, 0], lse[0, 0]), (second[0][0, 0], second[1][0, 0]))
    want = merge_attention([first, second])
    same_bits((out[1], lse[1]), (want[0][1], want[1][1]))


def test_weights_are_those_of_softmax():
    parts = [part(seed) for seed in range(3)]
    lses = np.stack([np.asarray(lse, np.float64) for _, lse in parts])
    weights = np.exp(lses) / np.exp(lses).sum(axis=0)
    outs = np.stack([np.asarray(out, np.float64) for out, _ in parts])
    out, lse = merge_attention(parts)
    assert_dtype_close(out, (weights[..., None] * outs).sum(axis=0), "float32")
    assert_dtype_close(lse, np.log(np.exp(lses).sum(axis=0)), "float32")


@pytest.mark.parametrize("lse", [-1e4, 1e4, 3e38])
def test_extreme_log_sum_exps(lse):
    """Equal ones give the mean, however far from zero."""
    first, second = part(0, lse), part(1, lse)
    out, total = merge_attention([first, second])
    assert_dtype_close(out, (first[0] + second[0]) / 2, "float32")
    np.testing.assert_allclose(total, lse + np.log(2), rtol=1e-6)


def test_the_first_part_gives_the_dtype():
    narrow, wide = part(0, dtype="bfloat16"), part(1)
    assert merge_attention([narrow, wide])[0].dtype == jnp.bfloat16
    assert merge_attention([wide, narrow])[0].dtype == jnp.float32
    assert merge_attention([narrow, narrow])[1].dtype == jnp.float32


def test_merging_in_two_steps_or_another_order_changes_only_rounding():
    a, b, c = (part(seed) for seed in range(3))
    whole = merge_attention([a, b, c])
    for other in (merge_attention([merge_attention([a, b]), c]), merge_attention([c, a, b])):
        assert_dtype_close(other[0], whole[0], "float32")
        assert_close(other[1], whole[1], rms=1e-6, max_abs=1e-6)
