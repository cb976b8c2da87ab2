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
) -> tuple[jax.Array, None]:
    """Attend with cuDNN; shapes and meaning as in `api.attention`.

    cuDNN aligns a causal mask with the first key, and knows windows below it only, of no more
    queries than keys. Where queries start later (`starts_at_zero` is False), a window has two
    sides or some queries have passed the last key, the rule becomes an explicit mask of `B·T·S`
    elements.

    Raises:
        NotSupported: not an NVIDIA GPU; a residual, dtype, head dimension, or soft cap that cuDNN
            lacks.
    """
    refuse_what_it_lacks(query, logits_softcap, device)
    if return_residual:
        # jax.nn rounds it to the query's dtype: wrong by a few per cent after exp. `attention`
        # takes `attention_cudnn_residual` instead.
        raise _refuse("return_residual=True", "False")

    key, value = visibility.clear_padding(key), visibility.clear_padding(value)
    T, S = query.shape[1], key.shape[1]
    options = {"scale": scale, "implementation": "cudnn"}
    left = visibility.left
    unwindowed = left is None and visibility.right is None
    if starts_at_zero and (unwindowed or (visibility.is_causal and T <= S)):
        out = backend(
            query, key, value, is_causal=visibility.is_causal,
            query_seq_lengths=visibility.query_lengths,
            key_value_seq_lengths=visibility.key_lengths,
            local_window_size=None if left is None else (left, 0), **options,
        )  # fmt: skip
    else:
        mask = visibility.mask(jnp.arange(T), jnp.arange(S))[:, None]
        out = backend(query, key, value, mask=mask, **options)
    lengths = visibility.query_lengths is not None or visibility.key_lengths is not None
    if starts_at_zero and not lengths and (left is None or T <= S):
        return out, None  # every row sees key 0, or the one at its position
    return visibility.clear_unseen(out, S), None  # cuDNN leaves the others undefined


def refuse_what_it_lacks(
    query: jax.Array, logits_softcap: float | None, device: DeviceSpec
) -> None:
    """Refuse devices, dtypes, head dimensions and soft caps.

    Raises:
        NotSupported: cuDNN has no attention for them.
    """
    if device.platform != "gpu":
        raise _refuse(f"device {device.name!r}", "NVIDIA GPUs")
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        raise _refuse(f"dtype {query.dtype}", "bfloat16, float16")
    widest = 256 if device.capability >= 90 else 128
    if query.shape[-1] % 8 or query.shape[-1] > widest:
        raise _refuse(f"head_dim {query.shape[-1]}", f"multiples of 8 up to {widest}")
    if logits_softcap is not None:
        raise _refuse(f"logits_softcap={logits_softcap}", "None")
