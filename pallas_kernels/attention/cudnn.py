"""Attention by cuDNN, through `jax.nn.dot_product_attention`."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels.attention.mask import Visibility
from jaxinfer.pallas_kernels.device import DeviceSpec
from jaxinfer.pallas_kernels.dispatch import NotSupported

_refuse = functools.partial(NotSupported, "attention", "cudnn")


def attention_cudnn(
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
    backend: Callable[..., jax.Array] = jax.nn.dot_product_attention,
) -> tuple[jax.Array, jax.Array | None]:
    """Attend with cuDNN; shapes and meaning as in `api.attention`.

    cuDNN aligns a causal mask with the first key. Where queries start later (`starts_at_zero` is
    False), the rule becomes an explicit mask of `B·T·S` elements.

    Returns:
        Output in the query's dtype, and log-sum-exp if `return_residual`.

    Raises:
        NotSupported: not an NVIDIA GPU, a dtype, head dimension or soft cap that cuDNN lacks.
    """
    if device.platform != "gpu":
        raise _refuse(f"device {device.name!r}", "NVIDIA GPUs")
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        raise _refuse(f"dtype {query.dtype}", "bfloat16, float16")
    if query.shape[-1] % 8 or query.shape[-1] > 256:
        raise _refuse(f"head_dim {query.shape[-1]}", "multiples of 8 up to 256")
    if logits_softcap is not None:
        raise _refuse(f"logits_softcap={logits_softcap}", "None")
    if return_residual and (visibility.key_lengths is not None or not starts_at_zero):
        # Rows that see no key have an undefined residual there.
        raise _refuse("return_residual with lengths or offsets", "dense calls")

    T, S = query.shape[1], key.shape[1]
    options = {"scale": scale, "implementation": "cudnn", "return_residual": return_residual}
    causal_window = visibility.is_causal or visibility.right is None
    if starts_at_zero and causal_window:
        left = visibility.left
        if left is not None and not visibility.is_causal:
            raise _refuse("a window without is_causal", "is_causal=True")
        result = backend(
            query, key, value, is_causal=visibility.is_causal,
            query_seq_lengths=visibility.query_lengths,
            key_value_seq_lengths=visibility.key_lengths,
            local_window_size=None if left is None else (left, 0), **options,
        )  # fmt: skip
    else:
        mask = visibility.mask(jnp.arange(T), jnp.arange(S))[:, None]
        result = backend(query, key, value, mask=mask, **options)
    out, lse = result if return_residual else (result, None)
    return _zero_unseen(out, visibility, S), lse


def _zero_unseen(out: jax.Array, visibility: Visibility, num_keys: int) -> jax.Array:
    """Zeros for rows that see no key, which cuDNN leaves undefined."""
    if visibility.query_lengths is None and visibility.key_lengths is None:
        return out
    T = out.shape[1]
    mask = visibility.mask(jnp.arange(T), jnp.arange(num_keys))
    return jnp.where(mask.any(axis=-1)[:, :, None, None], out, 0)
