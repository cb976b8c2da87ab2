"""Keys and values in other places than our pages: contiguous, and in other orders of axes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.pallas_kernels import plgpu
from jaxinfer.pallas_kernels.attention.pages import gather_pages
from jaxinfer.pallas_kernels.decode_attention.api import decode_attention
from jaxinfer.pallas_kernels.decode_attention.compat import paged_attention
from jaxinfer.pallas_kernels.decode_attention.layout import as_ours, cut, sizes, tokens_at
from jaxinfer.pallas_kernels.decode_attention.specs import DecodeSpec, make_inputs
from jaxinfer.pallas_kernels.dispatch import NotSupported
from tests.ops.cases import inputs, same_bits
from tests.ops.decode_attention.calls import call_reference, check, op

SPEC = DecodeSpec(model="layout", B=2, S=192, N=4, K=2, H=64, lengths=(190, 70))
OTHERS = {"PpKH": (0, 2, 1, 3), "KPpH": (1, 0, 2, 3)}


@pytest.mark.parametrize("layout", ["PKpH", *OTHERS])
def test_sizes_and_views(layout):
    pages = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)  # P, K, p, H
    moved = jnp.asarray(pages).transpose(OTHERS.get(layout, (0, 1, 2, 3)))
    assert sizes(moved.shape, layout) == (2, 3, 4)
    view = tokens_at(moved, layout, page=1, head=2, tokens=slice(1, 3))
    np.testing.assert_array_equal(view.get(), pages[1, 2, 1:3])
    np.testing.assert_array_equal(as_ours(moved, layout), pages)


@pytest.mark.parametrize("layout", list(OTHERS))
def test_other_orders_give_the_same(hopper, layout):
    query, k_pages, v_pages, *rows = inputs(make_inputs, SPEC, 31)
    moved = [pages.transpose(OTHERS[layout]) for pages in (k_pages, v_pages)]
    got = hopper.run(op("mosaic", SPEC, kv_layout=layout), query, *moved, *rows, num_sms=4)
    same_bits(got, hopper.run(op("mosaic", SPEC), query, k_pages, v_pages, *rows, num_sms=4))
    call = op("xla", SPEC, kv_layout=layout)
    same_bits(call(query, *moved, *rows), op("xla", SPEC)(query, k_pages, v_pages, *rows))


@pytest.mark.parametrize("S", [192, 80])
def test_contiguous_keys(hopper, S):
    """In pages of 64 and of 16, cut without a copy."""
    query, k_pages, v_pages, table, lengths = inputs(make_inputs, SPEC, 32)
    lengths = jnp.minimum(lengths, S)
    key, value = (gather_pages(pages, table)[:, :S] for pages in (k_pages, v_pages))
    want = call_reference(SPEC, (query, k_pages, v_pages, table, lengths))
    got = hopper.run(
        lambda *arrays: op("mosaic", SPEC)(*arrays[:3], None, arrays[3]),
        query, key, value, lengths, num_sms=4,
    )  # fmt: skip
    check(SPEC, got, want)
    check(SPEC, op("xla", SPEC)(query, key, value, None, lengths), want)


def test_contiguous_keys_are_not_copied(h100):
    shapes = [
        jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((2, 1, 4, 64), *2 * ((2, 192, 2, 64),))
    ]
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32)
    text = plgpu.lower_for_cuda(
        lambda *arrays: op("mosaic", SPEC)(*arrays[:3], None, arrays[3]), *shapes, lengths,
        spec=h100,
    )  # fmt: skip
    moved = re.findall(r"stablehlo.(?:transpose|gather|concatenate).*192", text)
    assert not moved


def test_contiguous_keys_that_no_page_divides(h100):
    key = jnp.zeros((1, 50, 2, 64), jnp.bfloat16)
    query, lengths = jnp.zeros((1, 1, 4, 64), jnp.bfloat16), jnp.array([50])
    assert cut(key)[0].shape == (1, 50, 2, 64)
    with pytest.raises(NotSupported, match="page_size 50"):
        decode_attention(query, key, key, None, lengths, implementation="mosaic")
    assert (
        decode_attention(query, key, key, None, lengths, implementation="xla").shape == query.shape
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ((2, 64, 64), (2, 64, 64), r"k_pages must be \[B, S, K, H\] where there is no page_table"),
        ((2, 64, 2, 64), (2, 32, 2, 64), "k_pages and v_pages must have one shape"),
        ((3, 64, 2, 64), (3, 64, 2, 64), "query and k_pages must have one row per request"),
        ((2, 0, 2, 64), (2, 0, 2, 64), "k_pages must not be empty"),
        ((2, 64, 3, 64), (2, 64, 3, 64), "multiple of KV heads; got N=4 and K=3"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_contiguous_keys_that_do_not_fit(key, value, message):
    query, lengths = jnp.zeros((2, 1, 4, 64)), jnp.ones((2,), jnp.int32)
    with pytest.raises(ValueError, match=message):
        decode_attention(query, jnp.zeros(key), jnp.zeros(value), None, lengths)


@pytest.mark.usefixtures("unchecked")
def test_unknown_orders_are_refused():
    arrays = inputs(make_inputs, SPEC, 33)
    with pytest.raises(ValueError, match=r"kv_layout must be one of .*; got 'HpKP'"):
        decode_attention(*arrays, kv_layout="HpKP")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:jax.experimental.pallas.ops.gpu:DeprecationWarning")
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("with_lengths", [True, False])
def test_the_adapter_means_what_jax_means(softcap, with_lengths):
    theirs = pytest.importorskip(
        "jax.experimental.pallas.ops.gpu.paged_attention", reason="this JAX has no paged_attention"
    )
    query, k_pages, v_pages, table, lengths = inputs(make_inputs, SPEC, 34)
    pages = [pages.transpose(OTHERS["KPpH"]).astype(jnp.float32) for pages in (k_pages, v_pages)]
    q, lengths = query[:, 0].astype(jnp.float32), lengths if with_lengths else None
    arrays = q, pages[0], pages[1], table, lengths
    options = {"attn_logits_soft_cap": softcap, "pages_per_compute_block": 1, "k_splits": 1}
    got = paged_attention(*arrays, **options)
    want = theirs.paged_attention(*arrays, **options, interpret=True)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_the_adapter_refuses_what_it_cannot_mean():
    arrays = inputs(make_inputs, SPEC, 35)
    pages = arrays[1].transpose(OTHERS["KPpH"])
    call = arrays[0][:, 0], pages, pages, arrays[3], arrays[4]
    with pytest.raises(TypeError, match="no argument 'splits'"):
        paged_attention(*call, splits=2)
    with pytest.raises(ValueError, match=r"q must have 3 dimensions; got shape \(2, 1, 4, 64\)"):
        paged_attention(arrays[0], *call[1:])
    with pytest.raises(ValueError, match=r"block_tables must have 2 dimensions; got shape"):
        paged_attention(*call[:3], arrays[3][0], None)
    with pytest.raises(ValueError, match="block_tables must have one row per request"):
        paged_attention(*call[:3], arrays[3][:1], None)
    with pytest.raises(NotImplementedError, match="8 bits"):
        paged_attention(*call, pages[..., 0])


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.usefixtures("unchecked")
def test_arrays_of_numpy_are_taken(contiguous):
    query, k_pages, v_pages, table, lengths = inputs(make_inputs, SPEC, 36)
    if contiguous:
        k_pages, v_pages, table = k_pages[:2], v_pages[:2], None
        k_pages, v_pages = (x.transpose(0, 2, 1, 3) for x in (k_pages, v_pages))
        lengths = lengths.clip(max=k_pages.shape[1])
    arrays = query, k_pages, v_pages, table, lengths
    given = [None if x is None else np.asarray(x) for x in arrays]
    same_bits(op("xla")(*given), op("xla")(*arrays))
