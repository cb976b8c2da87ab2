"""Attention by cuDNN with its log-sum-exp, which `jax.nn` hands on rounded to the query's dtype."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels.attention.cudnn import refuse_what_it_lacks
from jaxinfer.pallas_kernels.attention.mask import Visibility
from jaxinfer.pallas_kernels.device import DeviceSpec
from jaxinfer.pallas_kernels.dispatch import NotSupported

_refuse = functools.partial(NotSupported, "attention", "cudnn")


def attention_cudnn_residual(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visibility: Visibility,
    *,
    scale: float,
    logits_softcap: float | None = None,
    starts_at_zero: bool,
    device: DeviceSpec,
    backend: Callable[..., tuple[jax.Array, jax.Array]] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attend with cuDNN; shapes and meaning as in `api.attention` with `return_residual`.

    The function of JAX that keeps the log-sum-exp in float32 has no public name. Calls that would
    need an explicit mask are left to others: parts that are going to be merged are large.

    Raises:
        NotSupported: as `attention_cudnn`; an offset, a window with another side than the left of a
            causal mask, or one of more queries than keys; no cuDNN; another version of JAX.
    """
    refuse_what_it_lacks(query, logits_softcap, device)
    if not starts_at_zero:
        raise _refuse("return_residual=True with q_offset", "queries that start at key 0")
    windowed = visibility.left is not None or visibility.right is not None
    if windowed and not visibility.is_causal:
        raise _refuse("return_residual=True with a window of two sides", "causal windows")
    B, T, S = query.shape[0], query.shape[1], key.shape[1]
    if windowed and T > S:
        here = f"return_residual=True with a window, {T} queries and {S} keys"
        raise _refuse(here, "windows of no more queries than keys")
    lengths: dict[str, Any] = {}
    if visibility.query_lengths is not None or visibility.key_lengths is not None:
        given = (visibility.query_lengths, visibility.key_lengths)
        names = ("q_seqlen", "kv_seqlen")
        for name, held, every in zip(names, given, (T, S), strict=True):
            lengths[name] = jnp.full((B,), every, jnp.int32) if held is None else held
    kind = ("PADDING" if lengths else "", "CAUSAL" if visibility.is_causal else "")
    out, lse = (backend or _fused)(
        query, visibility.clear_padding(key), visibility.clear_padding(value), scale=scale,
        mask="_".join(filter(None, kind)) or "NO_MASK", **lengths,
        # Its window counts the query's own key.
        sliding_window_length=None if visibility.left is None else visibility.left + 1,
    )  # fmt: skip
    out, lse = _without_gradient(out, lse.transpose(0, 2, 1))  # [B, N, T] there
    if not lengths:
        return out, lse  # every row sees key 0, or the one at its position
    seen = _rows_that_see(visibility, T, S)[:, :, None]
    return jnp.where(seen[..., None], out, 0), jnp.where(seen, lse, -jnp.inf)


def _fused(query, key, value, *, mask: str, **options: Any) -> tuple[jax.Array, jax.Array]:
    version = f"JAX {jax.__version__}"
    try:
        import jax._src.cudnn.fused_attention_stablehlo as fused
    except ImportError:
        raise _refuse(f"{version} with return_residual=True", "JAX 0.11 and 0.12") from None
    try:
        fused.check_cudnn_version()
    except RuntimeError:
        raise _refuse(f"{version} without cuDNN", "jax[cuda13], jax[cuda12]") from None
    attend: Any = fused.dot_product_attention
    return attend(
        query, key, value, mask_type=fused.MaskType[mask], return_residual=True, **options
    )


def _rows_that_see(visibility: Visibility, num_tokens: int, num_keys: int) -> jax.Array:
    """`[B, T]` whether a row sees any key; queries start at key 0."""
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    first = jnp.zeros_like(token) if visibility.left is None else token - visibility.left
    held = num_keys if visibility.key_lengths is None else visibility.key_lengths[:, None]
    seen = jnp.maximum(first, 0)[None] < held
    if visibility.query_lengths is not None:
        seen &= token < visibility.query_lengths[:, None]
    return jnp.broadcast_to(seen, (visibility.q_offset.shape[0], num_tokens))


@jax.custom_vjp
def _without_gradient(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same, but an error where it is differentiated: JAX would ignore what `lse` does."""
    return out, lse


def _refuse_gradient(*_: Any) -> Any:
    raise _refuse("gradients with return_residual=True", "implementation='xla'")


_without_gradient.defvjp(_refuse_gradient, _refuse_gradient)
