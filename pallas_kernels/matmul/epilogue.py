"""What may follow a product in the same kernel."""

import math
from typing import Literal

import jax
import jax.numpy as jnp

Gate = Literal["silu", "gelu_tanh"]
GATES: tuple[Gate, ...] = ("silu", "gelu_tanh")


def gated(gate: Gate, x: jax.Array, up: jax.Array) -> jax.Array:
    """`silu(x) · up`, or `gelu(x) · up` with the tanh form of GELU; written for kernels too."""
    if gate == "silu":
        return x / (1.0 + jnp.exp(-x)) * up
    # (1 + tanh(z)) / 2, without tanh: the hardware's is off by up to 2^-11.
    twice = 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
    return x / (1.0 + jnp.exp(-twice)) * up
