"""Attention by tokamax's Mosaic GPU kernel, where the package is installed."""

import functools
import importlib
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels.attention.mask import Visibility
from jaxinfer.pallas_kernels.device import DeviceSpec
from jaxinfer.pallas_kernels.dispatch import NotSupported

_refuse = functools.partial(NotSupported, "attention", "tokamax")


def attention_tokamax(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visibility: Visibility,
    *,
    scale: float,
    logits_softcap: float | None = None,
    starts_at_zero: bool,
    return_residual: bool,
    device: DeviceSpec,
) -> tuple[jax.Array, None]:
    """Attend with tokamax; shapes and meaning as in `api.attention`.

    Raises:
        NotSupported: no Hopper GPU, tokamax absent, offsets, lengths or a residual asked for.
    """
    if not device.is_hopper:
        raise _refuse(f"device {device.name!r}", "Hopper GPUs")
    if importlib.util.find_spec("tokamax") is None:
        raise _refuse("calls without the tokamax package", "pip install 'jaxinfer[bench]'")
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        raise _refuse(f"dtype {query.dtype}", "bfloat16, float16")
    if return_residual:
        raise _refuse("return_residual=True", "False")
    if not starts_at_zero or visibility.query_lengths is not None:
        raise _refuse("q_offset or query_seq_lengths", "dense calls")
    # Where the package is absent, type checkers take an import statement for one of this module.
    try:
        tokamax: Any = importlib.import_module("tokamax")
    except ImportError as error:  # of something that it needs
        raise _refuse(f"a tokamax that cannot be imported ({error})", "a whole one") from error

    if visibility.left is not None or (visibility.right is not None and not visibility.is_causal):
        raise _refuse("local_window_size", "None")
    try:
        out = tokamax.dot_product_attention(
            query, visibility.clear_padding(key), visibility.clear_padding(value), scale=scale,
            is_causal=visibility.is_causal, key_value_seq_lengths=visibility.key_lengths,
            logits_soft_cap=logits_softcap, implementation="mosaic",
        )  # fmt: skip
    except NotImplementedError as error:
        raise _refuse(f"this call ({error})") from error
    if visibility.key_lengths is not None:
        out = visibility.clear_unseen(out, key.shape[1])
    return out, None
