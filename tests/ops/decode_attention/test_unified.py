"""The unified softmax of the Hopper kernel: one reference per piece, and the fallback."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.pallas_kernels.decode_attention.shape import Config
from jaxinfer.pallas_kernels.decode_attention.specs import SPECS, DecodeSpec, make_inputs
from tests.ops.cases import cases, inputs, same_bits
from tests.ops.decode_attention.calls import call_reference, check, op

# Three requests, two KV heads, units of 64 keys: pieces of several units, and of several requests.
SMALL = DecodeSpec(model="small", B=3, S=256, N=4, K=2, H=64, lengths=(250, 0, 100))
# Two KV heads of 4 rows lie in one tile of 8.
CUT = DecodeSpec(model="cut", B=1, S=128, N=8, K=2, H=64, lengths=(128,))
BLOCKS_OF_64 = Config(block=64, stages=2)
# What overflows is computed again; the simulated wgmma, a product of NumPy, says so.
overflowing = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")


def run(hopper, arrays, spec=SMALL, **options):
    """Output and log-sum-exp, and how many pieces fell back."""
    call = op("mosaic", spec, softmax="unified", return_fallbacks=True, **options)
    out, lse, fallbacks = hopper.run(call, *arrays, num_sms=2 * spec.K)
    return (out, lse), int(fallbacks)


@pytest.mark.parametrize("spec", cases(SPECS, "ci"))
def test_matches_reference(hopper, spec):
    arrays = inputs(make_inputs, spec, 21)
    got, _ = run(hopper, arrays, spec)
    check(spec, got, call_reference(spec, arrays))


@pytest.mark.parametrize("phi", [None, 0.0, 20.0, -30.0])
def test_a_reference_near_the_logits_needs_no_fallback(hopper, phi):
    arrays = inputs(make_inputs, SMALL, 22)
    phi = None if phi is None else jnp.full((SMALL.N,), phi)
    got, fallbacks = run(hopper, arrays, phi=phi, config=BLOCKS_OF_64)
    check(SMALL, got, call_reference(SMALL, arrays))
    assert fallbacks == 0


@overflowing
@pytest.mark.parametrize("phi", [-1e4, 1e4, 3e38, -3e38])
def test_a_reference_far_from_the_logits_falls_back(hopper, phi):
    """Weights overflow, or all underflow."""
    arrays = inputs(make_inputs, SMALL, 23)
    got, fallbacks = run(hopper, arrays, phi=jnp.full((SMALL.N,), phi), config=BLOCKS_OF_64)
    check(SMALL, got, call_reference(SMALL, arrays))
    assert fallbacks > 0


def test_one_wide_head_makes_its_own_pieces_fall_back(hopper):
    arrays = inputs(make_inputs, SMALL, 24)
    phi = jnp.zeros((SMALL.N,)).at[3].set(500.0)  # of the second KV head
    got, some = run(hopper, arrays, phi=phi, config=BLOCKS_OF_64)
    check(SMALL, got, call_reference(SMALL, arrays))
    _, all_ = run(hopper, arrays, phi=jnp.full((SMALL.N,), 500.0), config=BLOCKS_OF_64)
    assert 0 < some < all_


def test_rows_of_other_heads_in_the_tile_are_not_judged(hopper):
    """Against the keys of another head their logits may lie anywhere."""
    query, k_pages, v_pages, table, lengths = inputs(make_inputs, CUT, 28)
    k_pages = jnp.ones_like(k_pages)
    # Logits are 64 within a head, and 0 between the heads.
    k_pages = k_pages.at[:, 1, :, :32].set(-1)
    query = jnp.ones_like(query).at[:, :, 4:, :32].set(-1)
    arrays = query * 8, k_pages, v_pages, table, lengths
    got, fallbacks = run(hopper, arrays, CUT, phi=jnp.full((8,), 64.0), config=BLOCKS_OF_64)
    check(CUT, got, call_reference(CUT, arrays))
    assert fallbacks == 0
    phi = jnp.full((8,), 64.0).at[4].set(0.0)  # of a row of the second head, in two pieces
    _, fallbacks = run(hopper, arrays, CUT, phi=phi, config=BLOCKS_OF_64)
    assert fallbacks == 2


@pytest.mark.parametrize(("T", "window"), [(2, 3), (8, None)])
def test_rows_that_see_no_key_of_a_piece_are_not_judged(hopper, T, window):
    """The last block is seen by the last token alone, the first within a window by the first."""
    spec = DecodeSpec(
        model="rows", B=3, S=192, N=4, K=2, H=64, T=T, lengths=(65, 1, 129),
        local_window_size=window,
    )  # fmt: skip
    query, k_pages, v_pages, table, lengths = inputs(make_inputs, spec, 29)
    arrays = jnp.zeros_like(query), k_pages, v_pages, table, lengths
    call = op("mosaic", spec, softmax="unified", return_fallbacks=True, config=BLOCKS_OF_64)
    for num_sms in (2, 6):  # pieces of several units, and of one
        *got, fallbacks = hopper.run(call, *arrays, num_sms=num_sms)
        check(spec, got, call_reference(spec, arrays))
        assert fallbacks == 0


def test_the_one_row_that_sees_keys_is_judged(hopper):
    """And the piece falls back for it."""
    spec = DecodeSpec(model="rows", B=1, S=128, N=4, K=2, H=64, T=2, lengths=(65,))
    query, k_pages, v_pages, table, lengths = inputs(make_inputs, spec, 30)
    arrays = jnp.zeros_like(query), k_pages, v_pages, table, lengths
    call = op("mosaic", spec, softmax="unified", return_fallbacks=True, config=BLOCKS_OF_64)
    for head in range(4):
        phi = jnp.zeros((4,)).at[head].set(100.0)
        *got, fallbacks = hopper.run(functools.partial(call, phi=phi), *arrays, num_sms=4)
        check(spec, got, call_reference(spec, arrays))
        assert fallbacks == 2  # both pieces of the KV head


@overflowing
@pytest.mark.parametrize(("place", "falls_back"), [(0, False), (35, False), (170, True)])
def test_one_huge_logit(hopper, place, falls_back):
    """The rest of the keys weighs nothing; after a piece's first block that is a violation."""
    query, k_pages, v_pages, table, lengths = inputs(make_inputs, SMALL, 25)
    query = jnp.ones_like(query)
    k_pages = k_pages.at[table[0, place // 64], :, place % 64].set(100)  # logit 800
    arrays = query, k_pages, v_pages, table, lengths
    got, fallbacks = run(hopper, arrays, config=BLOCKS_OF_64)
    check(SMALL, got, call_reference(SMALL, arrays))
    assert fallbacks == (SMALL.K if falls_back else 0)  # one piece of each KV head
    assert all(np.isfinite(np.asarray(x, np.float32)[:1]).all() for x in got)


@overflowing
def test_huge_values_are_no_reason_for_infinities(hopper):
    """Weights above 1 times the largest values would overflow."""
    query, k_pages, v_pages, table, lengths = inputs(make_inputs, SMALL, 26)
    v_pages = (v_pages * 0.0 + 1e30).astype(v_pages.dtype)
    arrays = query, k_pages, v_pages, table, lengths
    (out, _), fallbacks = run(hopper, arrays, phi=jnp.full((SMALL.N,), -40.0))
    assert fallbacks > 0
    assert np.isfinite(np.asarray(out, np.float32)).all()


def test_two_runs_give_equal_bits(hopper):
    arrays = inputs(make_inputs, SMALL, 27)
    phi = jnp.full((SMALL.N,), 500.0)
    same_bits(run(hopper, arrays, phi=phi)[0], run(hopper, arrays, phi=phi)[0])
