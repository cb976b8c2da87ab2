"""While a kernel waits, memory brings what the next ones read into the L2 cache.

A kernel with little to read, or at its end, leaves memory idle. It is not over before what it asked
for has come, so it asks for no more than comes in the meantime.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels import plgpu
from jaxinfer.pallas_kernels.dispatch import NotSupported, choose
from jaxinfer.pallas_kernels.plgpu import pl

PREFERRED = ("none", "ask")  # measured on an H200: no gain
_MOST_BYTES = 16 << 20  # what an H200 reads in 4 µs; a third of its cache
_BLOCK = 128  # rows


def choose_prefetch(arrays: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """What a kernel asks for ahead: those of the arrays for which there is time, or none.

    `"prefetch=ask"` forces the former, `"prefetch=none"` the latter.

    Args:
        arrays: `[rows, columns]` each, in the order in which they will be read.

    Raises:
        NotSupported: asking is forced, in the interpreter.
    """
    if not arrays:
        return ()

    def ask() -> tuple[jax.Array, ...]:
        if plgpu.interpreting():
            raise NotSupported("prefetch", "ask", "the interpreter")
        parts = zip(arrays, plan_prefetch(arrays), strict=True)
        return tuple(array for array, part in parts if part.wanted)

    return choose("prefetch", None, {"ask": ask, "none": tuple}, PREFERRED)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Prefetch:
    """Which rows of an array are asked for.

    They come in blocks, spread over the array, so that its reader has some to wait for and some
    that are there all the way, and memory is busy too.

    Attributes:
        rows: Of the array.
        wanted: Blocks of rows that are asked for.
    """

    rows: int
    wanted: int

    @property
    def blocks(self) -> int:
        """Blocks of the array."""
        return -(-self.rows // _BLOCK)

    def row(self, i):
        """Which row is asked for as number i; may be past the end of the array."""
        block, within = lax.div(i, jnp.int32(_BLOCK)), lax.rem(i, jnp.int32(_BLOCK))
        return lax.div(block * self.blocks, jnp.int32(self.wanted)) * _BLOCK + within

    def ask(self, array, *, cta, ctas: int) -> None:
        """Ask for this CTA's share, in one warpgroup.

        Args:
            array: In global memory.
            cta: Number of the CTA.
            ctas: How many there are.
        """

        @pl.loop(cta, self.wanted * _BLOCK, step=ctas)
        def _ask(i):
            row = self.row(i)
            pl.when(row < self.rows)(lambda: plgpu.prefetch_to_l2(array.at[row]))


def plan_prefetch(arrays: Sequence[jax.Array | jax.ShapeDtypeStruct]) -> tuple[Prefetch, ...]:
    """What to ask for of each array `[rows, columns]`: all of the first ones, part of the last."""
    left, parts = _MOST_BYTES, []
    for array in arrays:
        rows, columns = array.shape
        row_bytes = columns * array.dtype.itemsize
        blocks = -(-rows // _BLOCK)
        # Instructions take multiples of 16 bytes.
        wanted = 0 if row_bytes % 16 else min(blocks, -(-left // (row_bytes * _BLOCK)))
        parts.append(Prefetch(rows=rows, wanted=wanted))
        left = max(left - wanted * min(rows, _BLOCK) * row_bytes, 0)
    return tuple(parts)
