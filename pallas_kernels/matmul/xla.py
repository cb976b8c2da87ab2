"""`matmul` in plain JAX."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import DTypeLike

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
    out_dtype: DTypeLike | None = None,
) -> jax.Array:
    """Multiply; shapes and meaning as in `api.matmul`."""
    x = divided(x)
    contract = (((x.ndim - 1,), (int(transposed),)), ((), ()))
    # What follows is computed in the dtype of the result.
    out = lax.dot_general(x, weight, contract, preferred_element_type=out_dtype)
    if bias is not None:
        out = out + bias.astype(out.dtype)
    if gate is not None:
        first, up = jnp.split(out, 2, axis=-1)
        first = jax.nn.silu(first) if gate == "silu" else jax.nn.gelu(first, approximate=True)
        out = first * up
    return out if residual is None else out + residual.astype(out.dtype)
