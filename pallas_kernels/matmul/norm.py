"""RMSNorm around a product: what is asked for at the end of one, and what the next one is given."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels.arguments import check_arrays

SQUARES_AT_ONCE = 64  # tiles whose sums are added at once: the rows of wgmma


@functools.partial(jax.tree_util.register_dataclass, data_fields=("weight",), meta_fields=("eps",))
@dataclasses.dataclass(frozen=True, slots=True)
class Norm:
    """An RMSNorm that follows a product.

    Attributes:
        weight: `[N]`, of any float dtype.
        eps: Added to the mean square; static under `jax.jit`.
    """

    weight: Any  # an array, or what JAX puts into a pytree in the place of one
    eps: float = 1e-6


def check_norm(norm: Norm, width: int, name: str) -> None:
    """Raise ValueError or TypeError unless it is a `Norm` of rows of `width`.

    Args:
        norm: What was given.
        width: Elements of a row.
        name: Of the argument, for messages.
    """
    if not isinstance(norm, Norm):
        raise TypeError(f"{name} must be a Norm; got {type(norm).__name__}")
    check_arrays(**{f"{name}.weight": norm.weight})
    if norm.weight.shape != (width,):
        raise ValueError(f"{name}.weight must have shape ({width},); got {norm.weight.shape}")
    if not norm.eps >= 0:
        raise ValueError(f"{name}.eps must not be negative; got {norm.eps}")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "squares"),
    meta_fields=("tiles", "eps"),
)
@dataclasses.dataclass(frozen=True, slots=True)
class UndividedNorm:
    """An RMSNorm whose division by the root mean square is left to the product that uses it.

    A kernel makes a result tile by tile, so that it knows the root mean square of a whole row only
    when it ends. That is one number per token, and it may as well scale the next product.

    Attributes:
        values: `[…, D]` the row times the weight of the norm.
        squares: `[S, rows]` float32: sums of squares of the row, by tiles in the first `tiles` of
            the S; tokens in the other dimension, padded to a multiple of 16.
        tiles: How many of `squares` hold something.
        eps: Added to the mean square.
    """

    values: Any
    squares: Any
    tiles: int
    eps: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the norm: `[…, D]`."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """Number of dimensions of the norm."""
        return self.values.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """Of the norm."""
        return self.values.dtype

    def divided(self) -> jax.Array:
        """The norm itself, `[…, D]`."""
        *leading, width = self.shape
        tokens = self.values.size // width
        mean = jnp.sum(self.squares[: self.tiles, :tokens], axis=0) / width
        scale = lax.rsqrt(mean + self.eps).reshape(*leading, 1)
        return (self.values.astype(jnp.float32) * scale).astype(self.dtype)


Tokens = jax.Array | UndividedNorm
"""What a product multiplies: an array, or a norm that it still has to divide."""


def divided(x: Tokens) -> jax.Array:
    """What `matmul_and_norm` returned as an array, whichever it was."""
    return x.divided() if isinstance(x, UndividedNorm) else x
