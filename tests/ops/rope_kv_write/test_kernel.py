"""The Hopper kernel of `rope_kv_write`: simulated with race detection, and on the GPU."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.pallas_kernels.rope_kv_write.api import rope_kv_write
from jaxinfer.pallas_kernels.rope_kv_write.mosaic_sm90 import rows_per_tile
from jaxinfer.pallas_kernels.rope_kv_write.specs import SPECS, RopeWriteSpec, make_inputs
from tests.metrics import assert_dtype_close
from tests.ops.cases import cases, inputs, same_bits
from tests.ops.rope_kv_write.calls import (
    STRAY_SLOTS,
    STRAYS,
    astray,
    call_reference,
    changed_slots,
    check,
)

mosaic = functools.partial(rope_kv_write, implementation="mosaic")
xla = functools.partial(rope_kv_write, implementation="xla")
SMALL = RopeWriteSpec(model="small", B=3, T=4, N=6, K=2, H=64, page_size=16, start=(3, 14, 31),
                      num_tokens=(4, 0, 2))  # fmt: skip


@pytest.mark.parametrize("spec", cases(SPECS, "ci"))
def test_matches_reference(hopper, spec):
    arrays = inputs(make_inputs, spec, 8)
    check(spec, hopper.run(mosaic, *arrays), call_reference(*arrays))


@pytest.mark.gpu
@pytest.mark.parametrize("spec", cases(SPECS, "primary"))
def test_matches_xla_at_model_shapes(hopper_gpu, spec):
    arrays = inputs(make_inputs, spec, 9)
    check(spec, hopper_gpu.run(mosaic, *arrays), jax.jit(xla)(*arrays))


@pytest.mark.parametrize(("N", "K", "H", "rows"), [
    (3, 1, 64, 4), (4, 2, 128, 2), (5, 3, 128, 4), (2, 1, 256, 1), (3, 3, 256, 2), (1, 3, 256, 4),
])  # fmt: skip
def test_divisions_of_the_heads(hopper, N, K, H, rows):
    """Every layout of the rotation's registers: 4, 2 and 1 heads at once."""
    assert rows_per_tile(N + K, H) == rows
    spec = RopeWriteSpec(model="heads", B=1, T=2, N=N, K=K, H=H, page_size=16, start=15)
    arrays = inputs(make_inputs, spec, 10)
    check(spec, hopper.run(mosaic, *arrays), call_reference(*arrays))


def test_tokens_past_the_count_are_written_nowhere(hopper):
    arrays = inputs(make_inputs, SMALL, 11)
    q, k, v, cos, sin, k_pages, v_pages, table, start, counts = arrays
    past = (jnp.arange(SMALL.T) >= counts[:, None])[:, :, None, None]
    k, v = jnp.where(past, jnp.nan, k), jnp.where(past, jnp.nan, v)
    table = table.at[1].set(10_000)
    got = hopper.run(
        mosaic, q, k, v, cos, sin, k_pages, v_pages, table, start.at[1].set(10_000), counts
    )
    want = call_reference(*arrays)
    assert_dtype_close(got[2], want[2], SMALL.dtype)
    same_bits(got[3], want[3])


def test_tokens_outside_the_table_or_the_pool_are_written_nowhere(hopper):
    """The kernel reads the table within its row only, and no page but those of the pool."""
    arrays = astray(inputs(make_inputs, STRAYS, 15))
    got = hopper.run(mosaic, *arrays)
    check(STRAYS, got, call_reference(*arrays))
    for pool, before in zip(got[2:], arrays[5:7], strict=True):
        assert changed_slots(pool, before) == STRAY_SLOTS


def test_pools_outside_the_call_keep_their_bits(hopper):
    """Without donation the caller's pools are copied, never written."""
    arrays = inputs(make_inputs, SMALL, 12)
    before = [pool.copy() for pool in arrays[5:7]]
    hopper.run(mosaic, *arrays)
    same_bits(arrays[5:7], before)


def test_two_runs_give_equal_bits(hopper):
    arrays = inputs(make_inputs, SMALL, 13)
    same_bits(hopper.run(mosaic, *arrays), hopper.run(mosaic, *arrays))


@pytest.mark.gpu
def test_donated_pools_are_updated_in_place(hopper_gpu):
    arrays = inputs(make_inputs, SMALL, 14)
    want = hopper_gpu.run(mosaic, *arrays)
    donating = jax.jit(mosaic, donate_argnums=(5, 6))
    addresses = [arrays[i].unsafe_buffer_pointer() for i in (5, 6)]
    got = hopper_gpu.run(donating, *arrays)
    assert [pool.unsafe_buffer_pointer() for pool in got[2:]] == addresses
    same_bits(got, want)
