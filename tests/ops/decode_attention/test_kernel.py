"""The Hopper kernel of `decode_attention`: simulated with race detection, and on the GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.pallas_kernels.decode_attention.shape import Config
from jaxinfer.pallas_kernels.decode_attention.specs import SPECS, DecodeSpec, make_inputs
from tests.metrics import assert_dtype_close
from tests.ops.cases import cases, inputs, same_bits
from tests.ops.decode_attention.calls import call_reference, check, check_rounding, op
from tests.ops.paging import poison

# Two requests over two pages each, two KV heads: requests that two groups of CTAs share.
SMALL = DecodeSpec(model="small", B=2, S=128, N=4, K=2, H=64, lengths=(100, 70))
BLOCKS_OF_64 = Config(block=64, stages=2)  # several units, and stages used twice


@pytest.mark.parametrize("spec", cases(SPECS, "ci"))
def test_matches_reference(hopper, spec):
    arrays = inputs(make_inputs, spec, 7)
    check(
        spec,
        hopper.run(op("mosaic", spec), *arrays, num_sms=2 * spec.K),
        call_reference(spec, arrays),
    )


@pytest.mark.gpu
@pytest.mark.parametrize(
    "spec", cases([s for s in SPECS if s.tag == "primary" and s.B * s.S <= 2**18])
)
def test_matches_reference_at_model_shapes(hopper_gpu, spec):
    arrays = inputs(make_inputs, spec, 8)
    got = hopper_gpu.run(op("mosaic", spec), *arrays, num_sms=0)
    # The reference would gather every key once per query head; one row at a time fits.
    for b in range(spec.B):
        row = tuple(x if i in (1, 2) else x[b : b + 1] for i, x in enumerate(arrays))
        check(spec, tuple(x[b : b + 1] for x in got), call_reference(spec, row))


@pytest.mark.parametrize("config", [
    Config(block=64, stages=2), Config(block=64, stages=3), Config(block=128, stages=2),
    Config(block=256, stages=2), Config(block=64, stages=2, ctas_per_sm=2),
], ids=["64x2", "64x3", "128x2", "256x2", "two-ctas"])  # fmt: skip
def test_tilings(hopper, config):
    arrays = inputs(make_inputs, SMALL, 9)
    got = hopper.run(op("mosaic", config=config), *arrays, num_sms=4)
    check(SMALL, got, call_reference(SMALL, arrays))


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("softmax", ["online", "unified"])
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("place", ["query", "keys", "values"])
def test_requests_do_not_see_each_other(hopper, place, value, softmax):
    """What is not finite stays with its request, also where one CTA has both."""
    arrays = list(inputs(make_inputs, SMALL, 17))
    want = call_reference(SMALL, arrays)
    index = ["query", "keys", "values"].index(place)
    at = (0, 0, 0, 3) if index == 0 else (arrays[3][0, 1], slice(None), 20, 3)
    arrays[index] = arrays[index].at[at].set(value)
    call = op("mosaic", softmax=softmax, config=BLOCKS_OF_64)
    got = hopper.run(call, *arrays, num_sms=2)
    check(SMALL, [x[1:] for x in got], [x[1:] for x in want])
    assert not all(np.isfinite(np.asarray(x, np.float32)[0]).all() for x in got)


def test_keys_beyond_the_table_are_not_looked_for(hopper):
    """The entry after a request's last is another request's."""
    *arrays, _ = inputs(make_inputs, SMALL, 18)
    call = op("mosaic", config=BLOCKS_OF_64)
    got, want = (
        hopper.run(call, *arrays, jnp.array(lengths, jnp.int32), num_sms=4)
        for lengths in ([300, -3], [128, 0])
    )
    same_bits(got, want)


@pytest.mark.parametrize("softcap", [5.0, 50.0])
def test_logits_beyond_the_cap(hopper, softcap):
    query, *rest = inputs(make_inputs, SMALL, 19)
    spec = dataclasses.replace(SMALL, logits_softcap=softcap)
    arrays = (query * softcap, *rest)
    got = hopper.run(op("mosaic", spec), *arrays, num_sms=4)
    check(spec, got, call_reference(spec, arrays))


@pytest.mark.parametrize("logits", ["scale 500", "one huge", "all equal"])
def test_adversarial_logits(hopper, logits):
    """Weights of one and zero, one key far above the rest, and no difference at all."""
    query, k_pages, v_pages, table, lengths = inputs(make_inputs, SMALL, 10)
    if logits == "scale 500":
        signs = jnp.sign(k_pages[..., :1])
        query, k_pages = jnp.full_like(query, 8), jnp.ones_like(k_pages) * 7.8125 * signs
    if logits == "one huge":
        query = jnp.ones_like(query)
        k_pages = k_pages.at[table[0, 1], :, 35].set(100)  # the last key of row 0: logit 800
    if logits == "all equal":
        k_pages = jnp.ones_like(k_pages)
    arrays = (query, k_pages, v_pages, table, lengths)
    want = call_reference(SMALL, arrays)
    got = hopper.run(op("mosaic", config=BLOCKS_OF_64), *arrays, num_sms=4)
    assert_dtype_close(got[0], want[0], SMALL.dtype, "out")
    # The lse is as large as the logits, so its error is relative to them.
    np.testing.assert_allclose(got[1], want[1], rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("lengths", [(0, 70), (0, 0)])
def test_empty_rows(hopper, lengths):
    spec = dataclasses.replace(SMALL, lengths=lengths)
    out, lse = hopper.run(op("mosaic"), *inputs(make_inputs, spec, 11), num_sms=4)
    empty = np.array(lengths) == 0
    np.testing.assert_array_equal((np.asarray(out) == 0).all(axis=(1, 2, 3)), empty)
    np.testing.assert_array_equal(np.isneginf(lse).all(axis=(1, 2)), empty)
    assert np.isfinite(out).all()


def test_calls_share_counters(hopper):
    """Each leaves zeros to the next."""
    arrays = inputs(make_inputs, SMALL, 15)

    def twice(*arrays):
        counters = jax.new_ref(jnp.zeros((SMALL.B * SMALL.K,), jnp.int32))
        call = op("mosaic", config=BLOCKS_OF_64, counters=counters)
        return *call(*arrays), *call(*arrays), counters[...]

    *got, counters = hopper.run(twice, *arrays, num_sms=4)
    check(SMALL, got[:2], call_reference(SMALL, arrays))
    same_bits(got[:2], got[2:])
    assert not np.asarray(counters).any()


def test_pages_in_another_order_give_equal_bits(hopper):
    query, k_pages, v_pages, table, lengths = inputs(make_inputs, SMALL, 12)
    order = jax.random.permutation(jax.random.key(1), len(k_pages))
    moved = (k_pages[order], v_pages[order], jnp.argsort(order).astype(jnp.int32)[table])
    got = hopper.run(op("mosaic"), query, *moved, lengths, num_sms=4)
    same_bits(got, hopper.run(op("mosaic"), query, k_pages, v_pages, table, lengths, num_sms=4))


@pytest.mark.parametrize("page_size", [16, 128])
def test_other_page_sizes_give_equal_bits(hopper, page_size):
    """The keys of a block meet in shared memory in one order, whatever pages they came from."""
    query, k_pages, v_pages, table, lengths = inputs(make_inputs, SMALL, 13)
    want = hopper.run(op("mosaic"), query, k_pages, v_pages, table, lengths, num_sms=4)

    def repage(pages):
        rows = pages[table].swapaxes(2, 3).reshape(2, 128 // page_size, page_size, 2, 64)
        return rows.swapaxes(2, 3).reshape(-1, 2, page_size, 64)

    table_of_16 = jnp.arange(2 * 128 // page_size, dtype=jnp.int32).reshape(2, -1)
    got = hopper.run(
        op("mosaic"), query, repage(k_pages), repage(v_pages), table_of_16, lengths, num_sms=4
    )
    same_bits(got, want)


@pytest.mark.parametrize("num_sms", [1, 7, 9])
def test_other_numbers_of_sms_change_only_rounding(hopper, num_sms):
    """One CTA with everything; cuts within requests; more CTAs than units."""
    arrays = inputs(make_inputs, SMALL, 14)
    call = op("mosaic", config=BLOCKS_OF_64)
    check_rounding(
        SMALL, hopper.run(call, *arrays, num_sms=num_sms), hopper.run(call, *arrays, num_sms=2)
    )


def test_two_runs_give_equal_bits(hopper):
    arrays = inputs(make_inputs, SMALL, 15)
    same_bits(
        hopper.run(op("mosaic"), *arrays, num_sms=4), hopper.run(op("mosaic"), *arrays, num_sms=4)
    )


@pytest.mark.parametrize("spec", [
    SMALL,
    dataclasses.replace(SMALL, page_size=16, lengths=(100, 3)),
    dataclasses.replace(SMALL, page_size=128, lengths=(1, 70)),
], ids=["p64", "p16", "p128"])  # fmt: skip
def test_unused_pages_and_slots_may_hold_anything(hopper, spec):
    """NaN there, as another request may have left it, and table entries that are no pages."""
    query, k_pages, v_pages, table, lengths = inputs(make_inputs, spec, 16)
    want = call_reference(spec, (query, k_pages, v_pages, table, lengths))
    dirty = poison(k_pages, v_pages, table, lengths)
    check(spec, hopper.run(op("mosaic"), query, *dirty, lengths, num_sms=4), want)


@pytest.mark.parametrize(("B", "K", "G"), [(8, 1, 3), (2, 4, 7), (1, 1, 3), (4, 2, 2), (2, 2, 10)])
def test_query_heads_that_tiles_of_8_do_not_hold(hopper, B, K, G):
    """Cut from unpadded rows as tiles of 16 or 8, or padded."""
    lengths = (64, 9, 40, 1, 30, 2, 64, 5)[:B]
    spec = DecodeSpec(model="heads", B=B, S=64, N=K * G, K=K, H=64, lengths=lengths)
    arrays = inputs(make_inputs, spec, 12)
    got = hopper.run(op("mosaic"), *arrays, num_sms=2 * K)
    check(spec, got, call_reference(spec, arrays))
