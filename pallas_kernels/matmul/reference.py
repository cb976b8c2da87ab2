"""The oracle of `matmul`: float32 throughout."""

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels.matmul.epilogue import Gate, gated
from jaxinfer.pallas_kernels.matmul.norm import Norm


def matmul_reference(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    norm: Norm | None = None,
    *,
    transposed: bool = False,
    gate: Gate | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Multiply; shapes and meaning as in `api.matmul`.

    Returns:
        `[…, N]` or `[…, N/2]` float32, with a norm that and the norm.
    """
    x, weight = x.astype(jnp.float32), weight.astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        out = x @ (weight.T if transposed else weight)
    if bias is not None:
        out = out + bias.astype(jnp.float32)
    if gate is not None:
        out = gated(gate, *jnp.split(out, 2, axis=-1))
    out = out if residual is None else out + residual.astype(jnp.float32)
    if norm is None:
        return out
    scale = jax.lax.rsqrt(jnp.mean(out * out, axis=-1, keepdims=True) + norm.eps)
    return out, out * scale * norm.weight.astype(jnp.float32)
