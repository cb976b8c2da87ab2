"""`rope_kv_write` in plain JAX."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.pallas_kernels.rope_kv_write.api import rope_kv_write
from jaxinfer.pallas_kernels.rope_kv_write.specs import SPECS, RopeWriteSpec, make_inputs
from tests.ops import oracle
from tests.ops.cases import cases, inputs, same_bits
from tests.ops.rope_kv_write.calls import (
    STRAY_SLOTS,
    STRAYS,
    astray,
    call_reference,
    changed_slots,
    check,
)

xla = jax.jit(functools.partial(rope_kv_write, implementation="xla"))
SMALL = RopeWriteSpec(model="small", B=3, T=5, N=4, K=2, H=6, page_size=4, start=(0, 3, 9),
                      num_tokens=(5, 0, 2), dtype="float32")  # fmt: skip


@pytest.mark.parametrize("spec", cases(SPECS, "ci"))
def test_matches_reference(spec):
    arrays = inputs(make_inputs, spec, 2)
    check(spec, xla(*arrays), call_reference(*arrays))


@pytest.mark.parametrize("changes", [
    {}, {"page_size": 1}, {"page_size": 7}, {"N": 9, "K": 3, "H": 2}, {"num_tokens": (0, 0, 0)},
], ids=str)  # fmt: skip
def test_odd_sizes(changes):
    spec = dataclasses.replace(SMALL, **changes)
    arrays = inputs(make_inputs, spec, 3)
    check(spec, xla(*arrays), oracle.rope_kv_write(*arrays))


def test_tokens_past_the_count_are_written_nowhere():
    """Whatever they hold, wherever their positions point, pools keep their bits."""
    arrays = inputs(make_inputs, SMALL, 4)
    q, k, v, cos, sin, k_pages, v_pages, table, start, counts = arrays
    past = (jnp.arange(SMALL.T) >= counts[:, None])[:, :, None, None]
    k, v = jnp.where(past, jnp.nan, k), jnp.where(past, jnp.nan, v)
    table = table.at[1].set(10_000)  # a row without tokens may have no pages
    got = xla(q, k, v, cos, sin, k_pages, v_pages, table, start.at[1].set(10_000), counts)
    same_bits(got[2:], xla(*arrays)[2:])


def test_tokens_outside_the_table_or_the_pool_are_written_nowhere():
    """Positions and entries that do not exist name no others, such as the last page."""
    arrays = astray(inputs(make_inputs, STRAYS, 8))
    got = xla(*arrays)
    check(STRAYS, got, call_reference(*arrays))
    for pool, before in zip(got[2:], arrays[5:7], strict=True):
        assert changed_slots(pool, before) == STRAY_SLOTS


def test_values_are_copied_bit_by_bit():
    arrays = inputs(make_inputs, SMALL, 5)
    v, table, start, counts = arrays[2], *arrays[7:]
    pages = xla(*arrays)[3]
    for b in range(SMALL.B):
        for t in range(int(counts[b])):
            page, slot = divmod(int(start[b]) + t, SMALL.page_size)
            same_bits(pages[table[b, page], :, slot], v[b, t])


def test_donated_pools_are_updated_in_place():
    arrays = inputs(make_inputs, SMALL, 6)
    want = xla(*arrays)
    donating = jax.jit(
        functools.partial(rope_kv_write, implementation="xla"), donate_argnums=(5, 6)
    )
    addresses = [arrays[i].unsafe_buffer_pointer() for i in (5, 6)]
    got = donating(*arrays)
    assert [pool.unsafe_buffer_pointer() for pool in got[2:]] == addresses
    assert arrays[5].is_deleted()
    same_bits(got, want)


def test_token_counts_change_without_recompilation():
    traces = []

    @jax.jit
    def call(*arrays):
        traces.append(1)
        return rope_kv_write(*arrays, implementation="xla")

    arrays = inputs(make_inputs, SMALL, 7)
    call(*arrays)
    call(*arrays[:8], arrays[8] + 1, arrays[9] * 0)
    assert len(traces) == 1
