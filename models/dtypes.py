"""Dtypes that weights and caches may have."""

from typing import Any

import jax.numpy as jnp


def check_floating(dtype: Any) -> None:
    """Raise TypeError for a dtype in which nothing can be computed."""
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise TypeError(f"dtype must be a floating dtype; got {jnp.dtype(dtype).name}")
