"""Attention of a rank on GPUs: cuDNN serves parts that are going to be merged."""

import dataclasses
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from jaxinfer.pallas_kernels import NotSupported, attention, choices
from jaxinfer.pallas_kernels.attention.cudnn_residual import attention_cudnn_residual
from jaxinfer.pallas_kernels.attention.specs import AttentionSpec, make_inputs
from jaxinfer.pallas_kernels.device import H100, use_device
from jaxinfer.sharding import ring_attention
from jaxinfer.sharding.sequence_parallel.paged import striped_chunk_attention
from tests.metrics import assert_dtype_close
from tests.ops.attention.calls import call_reference, check, visibility
from tests.ops.cases import inputs

SMALL = AttentionSpec(model="small", B=2, T=5, S=5, N=4, K=2, H=64, tag="ci")
FUSED = "jax._src.cudnn.fused_attention_stablehlo"
CHANGES: list[dict[str, Any]] = [
    {}, {"is_causal": False}, {"is_causal": False, "S": 9}, {"S": 9}, {"T": 9},
    {"key_lengths": (5, 0)}, {"is_causal": False, "key_lengths": (0, 3), "T": 7},
    {"query_lengths": (0, 3)}, {"query_lengths": (5, 2), "key_lengths": (4, 1)},
    {"local_window_size": 2}, {"local_window_size": (1, 0), "S": 9},
    {"local_window_size": (0, 3), "key_lengths": (2, 5)},
]  # fmt: skip


def fake(spec: AttentionSpec, query, key, value, *, mask, scale, sliding_window_length, **lengths):
    """cuDNN as it is told: what rows that see nothing hold is undefined."""
    assert scale == spec.H**-0.5
    assert ("PADDING" in mask) == bool(lengths)
    told = dataclasses.replace(
        spec,
        is_causal="CAUSAL" in mask,
        local_window_size=None if sliding_window_length is None else (sliding_window_length - 1, 0),
        query_lengths=tuple(lengths["q_seqlen"].tolist()) if lengths else None,
        key_lengths=tuple(lengths["kv_seqlen"].tolist()) if lengths else None,
    )
    out, lse = call_reference(told, (query, key, value))
    seen = jnp.isfinite(lse)
    out = jnp.where(seen[..., None], out, jnp.nan).astype(query.dtype)
    return out, jnp.where(seen, lse, jnp.nan).transpose(0, 2, 1)


def adapt(spec: AttentionSpec, arrays, **options: Any):
    query, key, value = arrays
    options = {"backend": functools.partial(fake, spec), "starts_at_zero": True} | options
    return attention_cudnn_residual(
        query, key, value, visibility(spec), scale=spec.H**-0.5, device=H100, **options
    )


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_cudnn_gets_what_the_call_means(changes):
    spec = dataclasses.replace(SMALL, **changes)
    arrays = inputs(make_inputs, spec, 1)
    out, lse = adapt(spec, arrays)
    want_out, want_lse = call_reference(spec, arrays)
    assert lse.dtype == jnp.float32
    assert_dtype_close(out, want_out, spec.dtype)
    np.testing.assert_array_equal(lse, want_lse)


def test_padding_may_hold_anything():
    spec = dataclasses.replace(SMALL, key_lengths=(5, 3))
    query, key, value = inputs(make_inputs, spec, 2)
    dirty = (query, key.at[1, 3:].set(jnp.nan), value.at[1, 3:].set(jnp.nan))
    for got, want in zip(adapt(spec, dirty), adapt(spec, (query, key, value)), strict=True):
        np.testing.assert_array_equal(got, want)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "softcap": ({}, {"logits_softcap": 5.0}, "logits_softcap=5.0; supported: None"),
    "dtype": ({"dtype": "float32"}, {}, "dtype float32"),
    "offset": ({}, {"starts_at_zero": False}, "q_offset; supported: queries that start at key 0"),
    "window": ({"local_window_size": 2, "is_causal": False}, {}, "supported: causal windows"),
    "past the keys": ({"local_window_size": 2, "T": 9}, {}, "a window, 9 queries and 5 keys"),
    "no cuDNN": ({}, {"backend": None}, "JAX .* without cuDNN; supported: jax.cuda13"),
}


@pytest.mark.parametrize(("changes", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals_name_what_would_do(monkeypatch, changes, options, message):
    def absent():
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(f"{FUSED}.check_cudnn_version", absent)
    spec = dataclasses.replace(SMALL, **changes)
    with pytest.raises(NotSupported, match=message):
        adapt(spec, inputs(make_inputs, spec, 3), **options)


def test_another_version_of_jax_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, FUSED, None)
    with pytest.raises(NotSupported, match=r"return_residual=True; supported: JAX 0\.11"):
        adapt(SMALL, inputs(make_inputs, SMALL, 4), backend=None)


def test_there_is_no_gradient_rather_than_a_wrong_one():
    query, key, value = inputs(make_inputs, SMALL, 5)
    with pytest.raises(NotSupported, match=r"gradients .* supported: implementation='xla'"):
        jax.grad(lambda query: adapt(SMALL, (query, key, value))[1].sum())(query)


@pytest.fixture
def cudnn(monkeypatch):
    """As if it were installed: enough to lower what it is told."""
    monkeypatch.setattr(f"{FUSED}.check_cudnn_version", lambda: 91000)
    with use_device(H100):
        yield


def lowered(local, *shapes) -> str:
    """Of a call on four ranks that need not be there, for GPUs; arrays are sharded by tokens."""
    mesh, spec = AbstractMesh((4,), ("seq",), (AxisType.Auto,)), P(None, "seq")
    call = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    return jax.jit(call).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.usefixtures("cudnn")
@pytest.mark.parametrize("placement", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize(("schedule", "transport"), [
    ("ring", "ppermute"), ("all_gather", "all_gather"),
])  # fmt: skip
def test_steps_of_a_ring_take_it(schedule, transport, placement):
    shapes = [((1, 64, heads, 64), jnp.bfloat16) for heads in (4, 2, 2)]

    def local(*arrays):
        return ring_attention(
            *arrays, axis_name="seq", placement=placement, schedule=schedule, transport=transport
        )

    text = lowered(local, *shapes)
    assert "__cudnn$fmha" in text
    assert choices()["attention"].implementation == "cudnn"
    assert "dot_general" not in text


@pytest.mark.usefixtures("cudnn")
def test_chunks_of_a_prompt_take_it():
    """Once for the tokens before the chunk, once for those in it."""

    def local(query, key, value, k_pages, v_pages, table, rows):
        k_pages, v_pages = (x[:, 0].transpose(0, 2, 1, 3) for x in (k_pages, v_pages))
        return striped_chunk_attention(
            query, key, value, k_pages, v_pages, table, rows[:, 0], rows[:, 0], axis_name="seq"
        )

    chunk = [((2, 32, heads, 64), jnp.bfloat16) for heads in (4, 2, 2)]
    text = lowered(
        local, *chunk, *[((6, 4, 16, 2, 64), jnp.bfloat16)] * 2, ((2, 12), jnp.int32),
        ((2, 4), jnp.int32),
    )  # fmt: skip
    assert text.count("custom_call @__cudnn$fmha") == 2
    assert "dot_general" not in text


@pytest.mark.gpu
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_matches_the_reference_on_a_gpu(changes):
    spec = dataclasses.replace(SMALL, **changes)
    check(spec, inputs(make_inputs, spec, 6), "cudnn")


@pytest.mark.gpu
@pytest.mark.parametrize("H", [64, 128, 256])
def test_the_log_sum_exp_is_that_of_xla_on_a_gpu(H):
    """Of many keys and large logits, where a rounded one is far off."""
    spec = dataclasses.replace(SMALL, T=130, S=1000, H=H, is_causal=False, key_lengths=(1000, 77))
    query, key, value = inputs(make_inputs, spec, 7)
    options: dict[str, Any] = {
        "key_value_seq_lengths": jnp.array(spec.key_lengths, jnp.int32), "return_residual": True
    }  # fmt: skip
    got = attention(query * 4, key, value, implementation="cudnn", **options)
    want = attention(query * 4, key, value, implementation="xla", **options)
    assert_dtype_close(got[0], want[0], spec.dtype)
    np.testing.assert_allclose(got[1], want[1], rtol=0, atol=2e-3)
