"""The oracle of `matmul`: float32 throughout."""

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels.matmul.epilogue import Gate, gated


def matmul_reference(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    transposed: bool = False,
    gate: Gate | None = None,
) -> jax.Array:
    """Multiply; shapes and meaning as in `api.matmul`.

    Returns:
        `[…, N]` or `[…, N/2]` float32.
    """
    x, weight = x.astype(jnp.float32), weight.astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        out = x @ (weight.T if transposed else weight)
    if bias is not None:
        out = out + bias.astype(jnp.float32)
    if gate is not None:
        out = gated(gate, *jnp.split(out, 2, axis=-1))
    return out if residual is None else out + residual.astype(jnp.float32)
