"""`matmul` in plain JAX."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels.matmul.epilogue import Gate
from jaxinfer.pallas_kernels.matmul.norm import Tokens, divided


def matmul_xla(
    x: Tokens,
    weight: jax.Array,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    transposed: bool = False,
    gate: Gate | None = None,
) -> jax.Array:
    """Multiply; shapes and meaning as in `api.matmul`."""
    x = divided(x)
    contract = (((x.ndim - 1,), (int(transposed),)), ((), ()))
    out = lax.dot_general(x, weight, contract)
    if bias is not None:
        out = out + bias
    if gate is not None:
        first, up = jnp.split(out, 2, axis=-1)
        first = jax.nn.silu(first) if gate == "silu" else jax.nn.gelu(first, approximate=True)
        out = first * up
    return out if residual is None else out + residual
