"""Attention by FlashAttention-3 (PyPI `flash-attn3-jax`), where the package is installed."""

import functools
import importlib.util

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels.attention.mask import Visibility
from jaxinfer.pallas_kernels.device import DeviceSpec
from jaxinfer.pallas_kernels.dispatch import NotSupported

_refuse = functools.partial(NotSupported, "attention", "flash_attn3")


def attention_flash_attn3(
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
) -> tuple[jax.Array, jax.Array | None]:
    """Attend with FlashAttention-3; shapes and meaning as in `api.attention`.

    Raises:
        NotSupported: no Hopper GPU, the package absent or of a version without what gives the
            residual, lengths, offsets or soft cap.
    """
    if not device.is_hopper:
        raise _refuse(f"device {device.name!r}", "Hopper GPUs")
    if importlib.util.find_spec("flash_attn3_jax") is None:
        raise _refuse("calls without the flash-attn3-jax package", "pip install 'jaxinfer[bench]'")
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        raise _refuse(f"dtype {query.dtype}", "bfloat16, float16")
    if query.shape[-1] not in (64, 128):  # its wheels are built without 256, and fail when run
        raise _refuse(f"head_dim {query.shape[-1]}", "64, 128")
    if logits_softcap is not None:
        raise _refuse(f"logits_softcap={logits_softcap}", "None")
    lengths = visibility.query_lengths is not None or visibility.key_lengths is not None
    if not starts_at_zero or lengths:
        raise _refuse("q_offset or lengths", "dense calls")
    # Causal masks and windows there are aligned with the last key, here with the first.
    masked = visibility.is_causal or visibility.left is not None or visibility.right is not None
    if masked and query.shape[1] != key.shape[1]:
        raise _refuse(f"T={query.shape[1]} with S={key.shape[1]}", "T = S")
    from flash_attn3_jax import flash_mha  # pyright: ignore[reportMissingImports]

    right = 0 if visibility.is_causal else visibility.right
    window = tuple(-1 if side is None else side for side in (visibility.left, right))
    if visibility.left is None and visibility.is_causal:
        window = (-1, -1)
    if not return_residual:
        out = flash_mha(
            query, key, value, softmax_scale=scale, is_causal=visibility.is_causal,
            window_size=window,
        )  # fmt: skip
        return out, None
    # The package exports only the function that is differentiable, and that drops the lse.
    try:
        from flash_attn3_jax.flash import _flash_mha_fwd  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise _refuse(
            "return_residual=True with another version of flash-attn3-jax", "version 0.2.3"
        ) from None
    out, lse = _flash_mha_fwd(query, key, value, scale, visibility.is_causal, window)
    return out, lse.transpose(0, 2, 1)  # [B, N, T] there
