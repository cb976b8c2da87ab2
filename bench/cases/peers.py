"""Calls of other projects' kernels that more than one op competes with."""

import functools
import importlib
import importlib.util
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels.attention.pages import gather_pages
from jaxinfer.pallas_kernels.decode_attention.specs import DecodeSpec
from jaxinfer.pallas_kernels.device import current_device
from jaxinfer.pallas_kernels.dispatch import NotSupported


def package(op: str, name: str, module: str) -> Any:
    """An optional package.

    Raises:
        NotSupported: it is not installed.
    """
    if importlib.util.find_spec(module) is None:
        raise NotSupported(op, name, f"calls without {module}", "pip install 'jaxinfer[bench]'")
    return importlib.import_module(module)


def contiguous(query, k_pages, v_pages, page_table, lengths) -> tuple:
    """Arrays of a decode call with keys and values `[B, S, K, H]` in one piece, as peers take."""
    copy = jax.jit(gather_pages)
    return query, copy(k_pages, page_table), copy(v_pages, page_table), lengths


def token_major(query, k_pages, v_pages, page_table, lengths) -> tuple:
    """Arrays of a decode call with pages `[P, p, K, H]`, as FlashAttention-3 takes."""
    return query, k_pages.swapaxes(1, 2), v_pages.swapaxes(1, 2), page_table, lengths


def jax_nn_decode(spec: DecodeSpec, implementation: Literal["xla", "cudnn"]) -> Any:
    """`jax.nn.dot_product_attention` of one token on a contiguous cache: what JAX users have."""

    def call(query, key, value, lengths):
        _refuse_windows(spec, "jax_nn" if implementation == "xla" else implementation)
        if implementation == "cudnn" and current_device().platform != "gpu":
            raise NotSupported("decode_attention", "cudnn", "this device", "NVIDIA GPUs")
        return jax.nn.dot_product_attention(
            query, key, value, key_value_seq_lengths=lengths, implementation=implementation
        )

    return call


def flash_attn3_decode(spec: DecodeSpec, *, splits: int, paged: bool) -> Any:
    """FlashAttention-3 with a KV cache; its number of splits is the caller's choice."""
    name = f"flash_attn3-{'paged-' if paged else ''}splits{splits}"
    refuse = functools.partial(NotSupported, "decode_attention", name)

    def call(query, key, value, *rest):
        _refuse_windows(spec, name)
        if not current_device().is_hopper:
            raise refuse("this device", "Hopper GPUs")
        module = package("decode_attention", name, "flash_attn3_jax")
        table = {"page_table": rest[0]} if paged else {}
        return module.flash_mha_with_kvcache(
            query, key, value, cache_seqlens=rest[-1].astype(jnp.int32), num_splits=splits, **table
        )

    return call


def _refuse_windows(spec: DecodeSpec, name: str) -> None:
    if spec.local_window_size is not None or spec.logits_softcap is not None or spec.T != 1:
        raise NotSupported("decode_attention", name, "windows, soft caps or several tokens", "none")
