"""What the functions of a decoder check of their arguments: all that is known while JAX traces."""

from typing import Any

import jax.numpy as jnp

from jaxinfer.models.cache import PagedKVCache
from jaxinfer.models.decoder import Decoder
from jaxinfer.models.errors import ContextLengthError


def check_call(model: Any, tokens: Any, cache: Any, num_tokens: Any, *, ndim: int) -> None:
    """Raise TypeError or ValueError for a call that cannot be meant.

    Args:
        model: To be a `Decoder`.
        tokens: To be integers, one row for each of the cache.
        cache: To be a `PagedKVCache` of that model.
        num_tokens: None, or an integer for each row.
        ndim: Dimensions of the tokens: 2 for rows of them, 1 for one each.

    Raises:
        ContextLengthError: more tokens than a row of the cache holds.
    """
    for name, value, kind in (("model", model, Decoder), ("cache", cache, PagedKVCache)):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__name__}; got {type(value).__name__}")
    _check_integers("tokens", tokens)
    shape = "[B, T]" if ndim == 2 else "[B]"
    if tokens.ndim != ndim or tokens.size == 0:
        raise ValueError(f"tokens must be {shape} and not empty; got shape {tokens.shape}")
    _check_cache(model, cache)
    rows = cache.page_table.shape[0]
    if tokens.shape[0] != rows:
        raise ValueError(f"tokens must be {shape} with the cache's B = {rows}; got {tokens.shape}")
    if num_tokens is not None:
        _check_integers("num_tokens", num_tokens)
        if num_tokens.shape != (rows,):
            raise ValueError(f"num_tokens must be [B] = ({rows},); got shape {num_tokens.shape}")
    elif ndim == 2 and tokens.shape[1] > cache.max_len:
        raise ContextLengthError(
            f"{tokens.shape[1]} tokens do not fit: rows of this cache hold {cache.max_len} "
            "(max_len of PagedKVCache.create)"
        )


def check_active(active: Any, cache: PagedKVCache) -> None:
    """Raise TypeError or ValueError unless it is None or one bool for each row."""
    if active is None:
        return
    if not hasattr(active, "dtype") or active.dtype != jnp.bool_:
        raise TypeError(f"active must be an array of bool; got {_kind(active)}")
    if active.shape != cache.lengths.shape:
        raise ValueError(f"active must be [B] = {cache.lengths.shape}; got shape {active.shape}")


def _check_integers(name: str, value: Any) -> None:
    is_array = hasattr(value, "dtype") and hasattr(value, "shape")
    if not is_array or not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(f"{name} must be an array of integers; got {_kind(value)}")


def _check_cache(model: Decoder, cache: PagedKVCache) -> None:
    """Raise ValueError for a cache that was made for another model."""
    config = model.config
    if len(cache.k_pages) != config.num_layers:
        raise ValueError(
            f"cache must have the model's {config.num_layers} layers; it has {len(cache.k_pages)}"
        )
    if model.parallel is not None:  # heads are padded, copied or one device's part
        return
    heads, width = cache.k_pages[0].shape[1], cache.k_pages[0].shape[3]
    if (heads, width) != (config.num_kv_heads, config.head_dim):
        raise ValueError(
            f"cache must have the model's {config.num_kv_heads} KV heads of {config.head_dim}; "
            f"it has {heads} of {width}"
        )


def _kind(value: Any) -> str:
    return str(value.dtype) if hasattr(value, "dtype") else type(value).__name__
