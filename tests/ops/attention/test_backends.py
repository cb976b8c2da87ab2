"""The adapters to cuDNN, FlashAttention-3 and tokamax: what they refuse, what they hand over."""

import dataclasses
import importlib.util
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.pallas_kernels.attention.api import attention
from jaxinfer.pallas_kernels.attention.cudnn import attention_cudnn
from jaxinfer.pallas_kernels.attention.flash_attn3 import attention_flash_attn3
from jaxinfer.pallas_kernels.attention.specs import SPECS, AttentionSpec, make_inputs
from jaxinfer.pallas_kernels.attention.tokamax import attention_tokamax
from jaxinfer.pallas_kernels.device import CPU, H100, use_device
from jaxinfer.pallas_kernels.dispatch import NotSupported, supported
from tests.metrics import assert_dtype_close
from tests.ops.attention.calls import call_reference, check, visibility
from tests.ops.cases import cases, inputs, same_bits, shapes_of

A100 = dataclasses.replace(H100, name="NVIDIA A100", capability=80)
SMALL = AttentionSpec(model="small", B=2, T=5, S=5, N=4, K=2, H=64, tag="ci")
RAGGED = dataclasses.replace(SMALL, query_lengths=(5, 2), key_lengths=(5, 0))
ADAPTERS = {
    "cudnn": attention_cudnn,
    "flash_attn3": attention_flash_attn3,
    "tokamax": attention_tokamax,
}
MODULES = {"flash_attn3": "flash_attn3_jax", "tokamax": "tokamax"}


def adapt(name, spec, arrays, *, device=H100, return_residual=False, **options):
    """Call an adapter as `attention` does."""
    out, lse = ADAPTERS[name](
        *arrays, visibility(spec), scale=spec.H**-0.5, logits_softcap=spec.logits_softcap,
        starts_at_zero=spec.q_offset is None, return_residual=return_residual, device=device,
        **options,
    )  # fmt: skip
    if return_residual:
        return out, lse
    assert lse is None
    return out


class FakeCudnn:
    """`jax.nn.dot_product_attention` computed by XLA; rows that see nothing are undefined: NaN."""

    def __init__(self, spec):
        self.spec = spec
        self.given: dict = {}

    def __call__(self, query, key, value, **options: Any):
        self.given = options
        assert options["implementation"] == "cudnn"
        options = options | {"implementation": "xla"}
        out = jax.nn.dot_product_attention(query, key, value, **options)
        S = key.shape[1]
        mask = visibility(self.spec).mask(jnp.arange(query.shape[1]), jnp.arange(S))
        return jnp.where(mask.any(axis=-1)[:, :, None, None], out, jnp.nan)


def through_fake_cudnn(spec, arrays):
    backend = FakeCudnn(spec)
    return adapt("cudnn", spec, arrays, backend=backend), backend.given


def narrow(spec):
    """A spec with heads and a dtype that the backends take."""
    return dataclasses.replace(spec, dtype="bfloat16", logits_softcap=None)


@pytest.mark.parametrize("spec", cases([*SPECS, RAGGED], "ci"))
def test_cudnn_gets_what_the_call_means(spec):
    spec = narrow(spec)
    arrays = inputs(make_inputs, spec, 1)
    out, _ = through_fake_cudnn(spec, arrays)
    assert_dtype_close(out, call_reference(spec, arrays)[0], spec.dtype)


@pytest.mark.parametrize("changes", [
    {"q_offset": (-2, 0)}, {"T": 9, "local_window_size": (1, 0)}, {"key_lengths": (0, 5)},
    {"query_lengths": (0, 3)}, {"T": 9, "local_window_size": 1, "is_causal": False},
], ids=["before the first key", "window past the keys", "no keys", "no queries", "two sides"],
)  # fmt: skip
def test_cudnn_rows_that_see_no_key_are_zero(changes):
    spec = dataclasses.replace(SMALL, **changes)
    arrays = inputs(make_inputs, spec, 2)
    out, _ = through_fake_cudnn(spec, arrays)
    want, lse = call_reference(spec, arrays)
    empty = np.isneginf(lse).all(axis=2)
    assert empty.any()
    np.testing.assert_array_equal((np.asarray(out) == 0).all(axis=(2, 3)), empty)
    assert_dtype_close(out, want, spec.dtype)


@pytest.mark.parametrize("q_offset", [None, (0, 0)], ids=["lengths", "mask"])
def test_cudnn_padding_may_hold_anything(q_offset):
    spec = dataclasses.replace(SMALL, key_lengths=(5, 3), q_offset=q_offset)
    query, key, value = inputs(make_inputs, spec, 3)
    dirty = (query, key.at[1, 3:].set(jnp.nan), value.at[1, 3:].set(jnp.nan))
    same_bits(through_fake_cudnn(spec, dirty)[0], through_fake_cudnn(spec, (query, key, value))[0])


@pytest.mark.parametrize(("changes", "expected"), [
    ({}, {"is_causal": True, "local_window_size": None}),
    ({"is_causal": False}, {"is_causal": False, "local_window_size": None}),
    ({"local_window_size": 3}, {"is_causal": True, "local_window_size": (3, 0)}),
    ({"query_lengths": (5, 2)}, {"query_seq_lengths": [5, 2], "key_value_seq_lengths": None}),
    ({"key_lengths": (5, 2)}, {"query_seq_lengths": None, "key_value_seq_lengths": [5, 2]}),
], ids=["causal", "full", "window", "queries", "keys"])  # fmt: skip
def test_cudnn_masks_by_itself_where_it_can(changes, expected):
    spec = dataclasses.replace(SMALL, **changes)
    _, given = through_fake_cudnn(spec, inputs(make_inputs, spec, 4))
    assert "mask" not in given
    assert given["scale"] == 0.125
    for name, value in expected.items():
        got = given[name].tolist() if isinstance(value, list) else given[name]
        assert got == value, name


@pytest.mark.parametrize("changes", [
    {"q_offset": (0, 3)}, {"local_window_size": (2, 1), "is_causal": False},
    {"local_window_size": 2, "T": 9},
], ids=["offset", "two-sided window", "window past the keys"])  # fmt: skip
def test_cudnn_gets_a_mask_where_it_cannot(changes):
    spec = dataclasses.replace(SMALL, **changes)
    _, given = through_fake_cudnn(spec, inputs(make_inputs, spec, 5))
    assert set(given) == {"mask", "scale", "implementation"}
    rule = visibility(spec).mask(jnp.arange(spec.T), jnp.arange(spec.S))
    same_bits(given["mask"], rule[:, None])


REFUSED = {
    "cudnn on a CPU": ("cudnn", {}, {"device": CPU}, "device 'cpu'", "NVIDIA GPUs"),
    "cudnn dtype": ("cudnn", {"dtype": "float32"}, {}, "dtype float32", "bfloat16, float16"),
    "cudnn odd": ("cudnn", {"H": 60}, {}, "head_dim 60", "multiples of 8 up to 256"),
    "cudnn wide": ("cudnn", {"H": 264}, {}, "head_dim 264", "multiples of 8 up to 256"),
    "cudnn A100": ("cudnn", {"H": 256}, {"device": A100}, "head_dim 256",
                   "multiples of 8 up to 128"),
    "cudnn softcap": ("cudnn", {"logits_softcap": 5.0}, {}, "logits_softcap=5.0", "None"),
    "cudnn residual": ("cudnn", {}, {"return_residual": True}, "return_residual=True", "False"),
    "fa3 A100": ("flash_attn3", {}, {"device": A100}, "device 'NVIDIA A100'", "Hopper GPUs"),
    "fa3 dtype": ("flash_attn3", {"dtype": "float32"}, {}, "dtype float32", "bfloat16, float16"),
    "fa3 head_dim": ("flash_attn3", {"H": 256}, {}, "head_dim 256", "64, 128"),
    "fa3 softcap": ("flash_attn3", {"logits_softcap": 5.0}, {}, "logits_softcap=5.0", "None"),
    "fa3 offset": ("flash_attn3", {"q_offset": (0, 0)}, {}, "q_offset or lengths", "dense calls"),
    "fa3 lengths": ("flash_attn3", {"key_lengths": (1, 1)}, {}, "q_offset or lengths",
                    "dense calls"),
    "fa3 causal": ("flash_attn3", {"S": 7}, {}, "T=5 with S=7", "T = S"),
    "fa3 window": ("flash_attn3", {"S": 7, "is_causal": False, "local_window_size": 2}, {},
                   "T=5 with S=7", "T = S"),
    "tokamax CPU": ("tokamax", {}, {"device": CPU}, "device 'cpu'", "Hopper GPUs"),
    "tokamax dtype": ("tokamax", {"dtype": "float32"}, {}, "dtype float32", "bfloat16, float16"),
    "tokamax residual": ("tokamax", {}, {"return_residual": True}, "return_residual=True", "False"),
    "tokamax offset": ("tokamax", {"q_offset": (0, 1)}, {}, "q_offset or query_seq_lengths",
                       "dense calls"),
    "tokamax queries": ("tokamax", {"query_lengths": (1, 1)}, {}, "q_offset or query_seq_lengths",
                        "dense calls"),
    "tokamax window": ("tokamax", {"local_window_size": 3}, {}, "local_window_size", "None"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "options", "argument", "nearest"), REFUSED.values(),
                         ids=REFUSED)  # fmt: skip
def test_refusals_name_the_argument_and_the_nearest(
    monkeypatch, name, changes, options, argument, nearest
):
    install(monkeypatch, "flash_attn3_jax")
    install(monkeypatch, "tokamax")
    spec = dataclasses.replace(SMALL, **changes)
    with pytest.raises(NotSupported) as error:
        adapt(name, spec, inputs(make_inputs, spec, 6), **options)
    assert (error.value.op, error.value.implementation) == ("attention", name)
    assert (error.value.argument, error.value.nearest) == (argument, nearest)


@pytest.mark.parametrize("name", MODULES)
def test_an_absent_package_is_named(monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(NotSupported, match=r"package; supported: pip install 'jaxinfer\[bench\]'"):
        adapt(name, SMALL, inputs(make_inputs, SMALL, 7))


def test_versions_without_the_residual_name_those_that_have_it(monkeypatch):
    """It comes from a private function."""
    install(monkeypatch, "flash_attn3_jax", flash_mha=flash_mha)
    for inner in (types.SimpleNamespace(), None):  # the module lacks the function, or is missing
        monkeypatch.setitem(sys.modules, "flash_attn3_jax.flash", inner)
        with pytest.raises(NotSupported, match=r"return_residual=True .* supported: version 0\.2"):
            adapt("flash_attn3", SMALL, inputs(make_inputs, SMALL, 7), return_residual=True)


def install(monkeypatch, module, **functions) -> None:
    """Make a package importable that holds only `functions`."""
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**functions))
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name if name == module else found(name)
    )


def flash_mha(query, key, value, *, softmax_scale, is_causal, window_size):
    """FlashAttention-3's rules: -1 is no limit, masks are aligned with the last key."""
    T, S = query.shape[1], key.shape[1]
    position = jnp.arange(T)[:, None] + S - T
    left, right = (S if side == -1 else side for side in window_size)
    right = min(right, 0) if is_causal else right
    keys = jnp.arange(S)
    mask = (keys >= position - left) & (keys <= position + right)
    return jax.nn.dot_product_attention(query, key, value, mask=mask[None, None],
                                        scale=softmax_scale)  # fmt: skip


@pytest.mark.parametrize("changes", [
    {}, {"is_causal": False}, {"is_causal": False, "S": 9}, {"local_window_size": 2},
    {"local_window_size": (3, 1)}, {"local_window_size": (1, 2), "is_causal": False},
], ids=str)  # fmt: skip
def test_flash_attn3_gets_what_the_call_means(monkeypatch, changes):
    install(monkeypatch, "flash_attn3_jax", flash_mha=flash_mha)
    spec = dataclasses.replace(SMALL, **changes)
    arrays = inputs(make_inputs, spec, 8)
    out = adapt("flash_attn3", spec, arrays)
    assert_dtype_close(out, call_reference(spec, arrays)[0], spec.dtype)


def test_flash_attn3_gives_the_residual(monkeypatch):
    def forward(query, key, value, scale, is_causal, window):
        assert (scale, is_causal, window) == (SMALL.H**-0.5, True, (-1, -1))
        out, lse = call_reference(SMALL, (query, key, value))
        return out.astype(query.dtype), lse.transpose(0, 2, 1)

    install(monkeypatch, "flash_attn3_jax", flash_mha=flash_mha)
    inner = types.SimpleNamespace(_flash_mha_fwd=forward)
    monkeypatch.setitem(sys.modules, "flash_attn3_jax.flash", inner)
    arrays = inputs(make_inputs, SMALL, 8)
    out, lse = adapt("flash_attn3", SMALL, arrays, return_residual=True)
    want_out, want_lse = call_reference(SMALL, arrays)
    assert_dtype_close(out, want_out, SMALL.dtype)
    same_bits(lse, want_lse)


def tokamax_attention(
    query, key, value, *, scale, is_causal, key_value_seq_lengths, logits_soft_cap, implementation
):
    """tokamax's rules; rows without keys are undefined: NaN."""
    assert implementation == "mosaic"
    if logits_soft_cap is not None:
        raise NotImplementedError("no soft cap today")
    out = jax.nn.dot_product_attention(
        query, key, value, scale=scale, is_causal=is_causal,
        key_value_seq_lengths=key_value_seq_lengths,
    )  # fmt: skip
    if key_value_seq_lengths is None:
        return out
    return jnp.where((key_value_seq_lengths > 0)[:, None, None, None], out, jnp.nan)


@pytest.mark.parametrize("changes", [
    {}, {"is_causal": False}, {"S": 9}, {"key_lengths": (5, 0)},
], ids=str)  # fmt: skip
def test_tokamax_gets_what_the_call_means(monkeypatch, changes):
    install(monkeypatch, "tokamax", dot_product_attention=tokamax_attention)
    spec = dataclasses.replace(SMALL, **changes)
    query, key, value = inputs(make_inputs, spec, 9)
    want, _ = call_reference(spec, (query, key, value))
    if spec.key_lengths:  # padding may hold anything
        key, value = key.at[1].set(jnp.nan), value.at[1].set(jnp.nan)
    assert_dtype_close(adapt("tokamax", spec, (query, key, value)), want, spec.dtype)


def test_what_tokamax_does_not_implement_is_not_supported(monkeypatch):
    install(monkeypatch, "tokamax", dot_product_attention=tokamax_attention)
    spec = dataclasses.replace(SMALL, logits_softcap=5.0)
    with pytest.raises(NotSupported, match=r"this call \(no soft cap today\)"):
        adapt("tokamax", spec, inputs(make_inputs, spec, 10))


def test_attention_hands_everything_to_the_adapters(monkeypatch):
    """Through the public function: scale, masks and the order of preference on Hopper."""
    given = {}

    def flash(query, key, value, **options):
        given.update(options)
        return query

    install(monkeypatch, "flash_attn3_jax", flash_mha=flash)
    arrays = inputs(make_inputs, dataclasses.replace(SMALL, H=128), 11)
    with use_device(H100):
        out = attention(*arrays, is_causal=True, scale=0.5, local_window_size=(2, 9))
    same_bits(out, arrays[0])
    assert given == {"softmax_scale": 0.5, "is_causal": True, "window_size": (2, 0)}


def skip_if_refused(spec, implementation) -> None:
    """Skip what a backend does not take on the device at hand; other errors come with the call."""
    reason = supported(attention, *shapes_of(make_inputs, spec), **spec.options)[implementation]
    if "does not support" in reason:
        pytest.skip(reason)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ADAPTERS)
@pytest.mark.parametrize("spec", cases([*SPECS, RAGGED], "ci"))
def test_matches_reference_on_a_gpu(spec, implementation):
    spec = narrow(spec)
    skip_if_refused(spec, implementation)
    with_residual = implementation == "flash_attn3"
    check(spec, inputs(make_inputs, spec, 13), implementation, residual=with_residual)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ADAPTERS)
@pytest.mark.parametrize("spec", cases([s for s in SPECS if s.tag == "primary" and s.T <= 4096]))
def test_matches_xla_at_model_shapes_on_a_gpu(spec, implementation):
    skip_if_refused(spec, implementation)
    arrays = inputs(make_inputs, spec, 14)
    want = attention(*arrays, **spec.options, implementation="xla")
    got = attention(*arrays, **spec.options, implementation=implementation)
    assert_dtype_close(got, want, spec.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("q_offset", [None, (0, 0)], ids=["lengths", "mask"])
def test_padding_may_hold_anything_on_a_gpu(q_offset):
    spec = dataclasses.replace(SMALL, key_lengths=(5, 3), q_offset=q_offset)
    query, key, value = inputs(make_inputs, spec, 15)
    want, _ = call_reference(spec, (query, key, value))
    dirty = (query, key.at[1, 3:].set(jnp.nan), value.at[1, 3:].set(jnp.nan))
    out = attention(*dirty, **spec.options, implementation="cudnn")
    assert_dtype_close(out, want, spec.dtype)


def test_a_tokamax_that_lacks_what_it_needs(monkeypatch):
    """Another implementation can then serve, as where it is absent."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "tokamax", None)  # importing it fails
    spec = narrow(SMALL)
    arrays = inputs(make_inputs, spec, 6)
    with pytest.raises(NotSupported, match=r"a tokamax that cannot be imported .*tokamax"):
        adapt("tokamax", spec, arrays)
