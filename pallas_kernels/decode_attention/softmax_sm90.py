"""Softmax over blocks of keys, as the keys of a piece come by.

Columns are query rows; a block of logits is `[block, rows]` in base 2. Both kinds keep, for every
column, a reference φ and the sum of 2^(x − φ) over the keys so far, which is still spread over the
threads: only the end of a piece adds it up.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels import plgpu
from jaxinfer.pallas_kernels.decode_attention.shape import Shape

LOG2E = math.log2(math.e)
COLUMNS = plgpu.Layout.WGMMA.reduce(0)
COLUMNS_AT_ONCE = 64  # of the head dimension, on the way from registers to the output


class Sums(NamedTuple):
    """What is known of a piece so far.

    Attributes:
        phi: `[rows]` float32, reference of every column.
        weights: `[block, rows]` float32, sums of weights, one per thread and column.
    """

    phi: jax.Array
    weights: jax.Array


class Piece(NamedTuple):
    """Which keys a piece has, and whose rows.

    Attributes:
        begin: First block.
        end: One past the last.
        length: Keys of the request.
    """

    begin: jax.Array
    end: jax.Array
    length: jax.Array


@dataclasses.dataclass(frozen=True, slots=True)
class Online:
    """Follows the largest logit and rescales what came before (FlashAttention).

    Never overflows; every block waits for a maximum over the whole warpgroup.
    """

    shape: Shape

    def start(self) -> Sums:
        """Before the first key of the first piece."""
        shape = self.shape
        phi = plgpu.layout_cast(jnp.full((shape.rows,), -jnp.inf, jnp.float32), COLUMNS)
        return Sums(phi, _zeros((shape.config.block, shape.rows)))

    def weigh(self, logits, sums: Sums, acc, is_first, head) -> tuple[Any, Sums, Any]:
        """Weights of a block, the new sums, and the accumulator in terms of the new reference."""
        del is_first, head
        phi = jnp.maximum(sums.phi, logits.max(axis=0))
        # A column that has seen no key yet keeps -inf; subtract 0 from it instead.
        safe = jnp.where(phi == -jnp.inf, 0.0, phi)
        weights = jnp.exp2(logits - lax.broadcast_in_dim(safe, logits.shape, [1]))
        correction = jnp.exp2(sums.phi - safe)
        total = sums.weights * lax.broadcast_in_dim(correction, logits.shape, [1]) + weights
        return weights, Sums(phi, total), acc * lax.broadcast_in_dim(correction, acc.shape, [1])

    def violations(self, total, acc, piece: Piece) -> Any:
        """Nothing can go wrong."""
        del total, acc, piece
        return jnp.int32(0)

    def restart(self, sums: Sums, is_last) -> Sums:
        """Before the next piece, if this one ends."""
        return Sums(jnp.where(is_last, -jnp.inf, sums.phi), jnp.where(is_last, 0.0, sums.weights))


@dataclasses.dataclass(frozen=True, slots=True)
class Unified:
    """Keeps one reference for a whole piece (FlashDecoding++, section 3).

    Blocks do not wait for each other's maxima. A piece whose sums leave the range in which weights
    are exact enough is a violation and must be computed again by `Online`.

    Attributes:
        shape: Of the call.
        phi: Reference of every query row, in global memory; None: the largest logit of the piece's
            first block.
        limits: Least and largest sum of weights that is trusted.
    """

    shape: Shape
    phi: Any
    limits: tuple[float, float]

    def start(self) -> Sums:
        """Before the first key of the first piece."""
        shape = self.shape
        phi = plgpu.layout_cast(jnp.zeros((shape.rows,), jnp.float32), COLUMNS)
        return Sums(phi, _zeros((shape.config.block, shape.rows)))

    def weigh(self, logits, sums: Sums, acc, is_first, head) -> tuple[Any, Sums, Any]:
        """Weights of a block, the new sums, and the accumulator, which needs no change."""

        def first():
            if self.phi is not None:
                return plgpu.load(self.phi.at[head], layout=COLUMNS, optimized=False)
            phi = logits.max(axis=0)
            return jnp.where(phi == -jnp.inf, 0.0, phi)

        phi = lax.cond(is_first, first, lambda: sums.phi)
        weights = jnp.exp2(logits - lax.broadcast_in_dim(phi, logits.shape, [1]))
        return weights, Sums(phi, sums.weights + weights), acc

    def violations(self, total, acc, piece: Piece) -> Any:
        """1 if some column's sums are not to be trusted, else 0.

        Columns beyond R and rows that rightly see none of the keys are not judged.
        """
        least, largest = self.limits
        # x · 0 is 0 unless x is Inf or NaN.
        finite = (acc * 0.0).sum(axis=0) == 0.0
        trusted = (total >= least) & (total <= largest) & finite
        if (judged := rows_that_see(self.shape, piece)) is not None:
            trusted |= jnp.logical_not(judged)
        return jnp.where(trusted, 0, 1).astype(jnp.int32).max(axis=0)

    def restart(self, sums: Sums, is_last) -> Sums:
        """Before the next piece, if this one ends."""
        return Sums(sums.phi, jnp.where(is_last, 0.0, sums.weights))


def trusted_sums(dtype: Any) -> tuple[float, float]:
    """Limits for `Unified`, by the dtype that weights are rounded to before they meet V.

    No weight may exceed the largest sum, so none overflows. With bfloat16, weights that matter
    next to the least sum (2^-24 of it) are far from underflow, and sums of values up to 2^47 stay
    finite. float16 has few exponents: small weights lose bits early, hence a narrow range.
    """
    if jnp.dtype(dtype) == jnp.float16:
        return 1.0, 2.0**15
    return 2.0**-60, 2.0**80


def _zeros(shape: tuple[int, ...]):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def scaled(shape: Shape, logits):
    """Logits in base 2: scale, soft cap and log2(e) applied."""
    if shape.softcap is None:
        return logits * (shape.scale * LOG2E)
    # The hardware's tanh is off by up to 2^-11, which with a cap of 50 changes a weight by 2.5 %;
    # its 2^x is exact enough.
    growth = jnp.exp2(logits * (2 * LOG2E * shape.scale / shape.softcap))
    return (1.0 - 2.0 / (1.0 + growth)) * (shape.softcap * LOG2E)


def rows_that_see(shape: Shape, piece: Piece) -> Any:
    """`[rows]` bool, rows of this KV head that see a key of the piece; None: all of the tile.

    A request's blocks are those that some query sees, so where there is one, it sees keys in each.
    """
    if shape.T == 1 and shape.rows == shape.R:
        return None
    row = plgpu.broadcasted_iota(jnp.int32, (shape.rows,), 0, layout=COLUMNS)
    rows = row < shape.R
    if shape.T == 1:
        return rows
    position = _position(shape, row, piece.length)
    rows &= position >= piece.begin * shape.config.block
    if shape.left_window is not None:
        rows &= position - shape.left_window < piece.end * shape.config.block
    return rows


def _position(shape: Shape, row, length):
    """Of the query token of every row, T > 1; the division of a row by G, without dividing."""
    position = length - shape.T
    for t in range(1, shape.T):
        position = position + (row >= t * shape.G).astype(jnp.int32)
    return position


def mask(shape: Shape, logits, block, length):
    """-inf where a key lies after a query's position, before its window, or past the length."""
    key = plgpu.broadcasted_iota(jnp.int32, logits.shape, 0, layout=plgpu.Layout.WGMMA)
    key = key + block * shape.config.block
    if shape.T == 1:
        position = length - 1
    else:
        row = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=plgpu.Layout.WGMMA)
        position = _position(shape, row, length)
    visible = key <= position
    if shape.left_window is not None:
        visible &= key >= position - shape.left_window
    return jnp.where(visible, logits, -jnp.inf)
