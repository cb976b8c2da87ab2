"""`add_rms_norm` in plain JAX: XLA makes an elementwise and a reduction kernel of it."""

import jax
import jax.numpy as jnp


def add_rms_norm_xla(
    x: jax.Array, residual: jax.Array | None, weight: jax.Array, *, eps: float
) -> tuple[jax.Array, jax.Array]:
    """Add and normalise; shapes and meaning as in `api.add_rms_norm`."""
    total = x if residual is None else x + residual
    wide = total.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * weight.astype(jnp.float32)).astype(x.dtype), total
