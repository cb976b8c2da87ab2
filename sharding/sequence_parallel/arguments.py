"""Checks of arguments that the functions for sharded sequences share."""

import math

import jax
import jax.numpy as jnp


def check_arrays(
    query: jax.Array, key: jax.Array, value: jax.Array, scale: float | None
) -> tuple[int, int, int, int]:
    """B, T, N, H of a rank's queries, after checking that keys and values go with them.

    Raises:
        ValueError: shapes or a scale that do not fit.
        TypeError: dtypes that differ.
    """
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.ndim != 4:
            raise ValueError(f"{name} must have 4 dimensions; got shape {array.shape}")
        if array.size == 0:
            raise ValueError(f"{name} must not be empty; got shape {array.shape}")
    if query.shape[:2] != key.shape[:2] or key.shape != value.shape:
        raise ValueError(
            f"query, key and value must have the same batch size and tokens; got shapes "
            f"{query.shape}, {key.shape}, {value.shape}"
        )
    if query.shape[3] != key.shape[3]:
        raise ValueError(
            f"head_dim of query and key must agree; got {query.shape[3]} and {key.shape[3]}"
        )
    if query.shape[2] % key.shape[2]:
        raise ValueError(
            f"query heads must be a multiple of KV heads; got N={query.shape[2]} and "
            f"K={key.shape[2]}"
        )
    if not (query.dtype == key.dtype == value.dtype):
        raise TypeError(
            f"query, key and value must have one dtype; "
            f"got {query.dtype}, {key.dtype}, {value.dtype}"
        )
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite; got {scale}")
    B, T, N, H = query.shape
    return B, T, N, H


def per_row(lengths: jax.Array | int | None, batch: int) -> jax.Array | None:
    """Lengths as `[B]` int32.

    Raises:
        ValueError: neither a scalar nor `[B]`.
        TypeError: no integers.
    """
    if lengths is None:
        return None
    array = jnp.asarray(lengths)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"lengths must be integers; got {array.dtype}")
    if array.shape not in ((), (batch,)):
        raise ValueError(f"lengths must be a scalar or [B] with B={batch}; got {array.shape}")
    return jnp.broadcast_to(array.astype(jnp.int32), (batch,))
