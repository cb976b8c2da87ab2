"""The oracle of `add_rms_norm`: float32 throughout, the sum rounded once."""

import jax
import jax.numpy as jnp


def add_rms_norm_reference(
    x: jax.Array, residual: jax.Array | None, weight: jax.Array, *, eps: float
) -> tuple[jax.Array, jax.Array]:
    """Add and normalise; shapes and meaning as in `api.add_rms_norm`."""
    total = x.astype(jnp.float32)
    if residual is not None:
        total = (total + residual.astype(jnp.float32)).astype(x.dtype).astype(jnp.float32)
    mean_square = jnp.mean(total**2, axis=-1, keepdims=True)
    normed = total / jnp.sqrt(mean_square + eps) * weight.astype(jnp.float32)
    return normed.astype(x.dtype), total.astype(x.dtype)
