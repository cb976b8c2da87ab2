"""Merging the pieces of a request: by the CTA that finishes the last one, or by a second kernel."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels import plgpu
from jaxinfer.pallas_kernels.decode_attention.plan import Bounded
from jaxinfer.pallas_kernels.decode_attention.shape import Shape
from jaxinfer.pallas_kernels.decode_attention.softmax_sm90 import COLUMNS_AT_ONCE, LOG2E
from jaxinfer.pallas_kernels.plgpu import pl

_GROUP = 8  # pieces whose loads are in flight together
_IN_FLIGHT = 64  # most values per thread of these


def merged(
    shape: Shape, piece_out, piece_lse, *, first_piece, pieces, begin: Any = 0, columns: int
):
    """What the pieces come to, `[columns, rows]` float32, and its natural lse `[rows]`.

    Args:
        shape: Of the call.
        piece_out: `[pieces of all, H, rows]`, normalised.
        piece_lse: `[pieces of all, rows]`, base 2.
        first_piece: Number of the first.
        pieces: How many follow each other; 0: an empty request, zeros and -inf.
        begin: First column.
        columns: How many, in one go.
    """
    along_rows = plgpu.Layout.WGMMA.reduce(0)
    tile = (columns, shape.rows)
    size = max(1, min(_GROUP, _IN_FLIGHT * 128 // (columns * shape.rows)))
    peak = plgpu.layout_cast(jnp.full((shape.rows,), -jnp.inf, jnp.float32), along_rows)
    total = plgpu.layout_cast(jnp.zeros((shape.rows,), jnp.float32), along_rows)
    acc = plgpu.layout_cast(jnp.zeros(tile, jnp.float32), plgpu.Layout.WGMMA)

    def add_group(group, carry):
        """Add a few pieces at once: their loads wait for memory together."""
        acc, total, peak = carry
        lses, parts = [], []
        for i in range(size):
            index = group * size + i
            piece = first_piece + lax.min(index, pieces - 1)
            lse = plgpu.load(piece_lse.at[piece], layout=along_rows, optimized=False)
            absent = jnp.where(index < pieces, 0.0, -jnp.inf).astype(jnp.float32)
            lses.append(lse + absent)
            part = piece_out.at[piece, pl.ds(begin, columns)]
            parts.append(plgpu.load(part, layout=plgpu.Layout.WGMMA, optimized=False))
        new_peak = functools.reduce(jnp.maximum, lses, peak)
        safe = jnp.where(new_peak == -jnp.inf, 0.0, new_peak)
        correction = jnp.exp2(peak - safe)
        acc = acc * lax.broadcast_in_dim(correction, acc.shape, [1])
        total = total * correction
        for lse, value in zip(lses, parts, strict=True):
            weight = jnp.exp2(lse - safe)
            acc = acc + value * lax.broadcast_in_dim(weight, acc.shape, [1])
            total = total + weight
        return acc, total, new_peak

    groups = lax.div(pieces + size - 1, jnp.int32(size))
    acc, total, peak = lax.fori_loop(0, groups, add_group, (acc, total, peak))
    is_empty = total == 0.0
    divisor = jnp.where(is_empty, 1.0, total)
    result = acc / lax.broadcast_in_dim(divisor, acc.shape, [1])
    return result, jnp.where(is_empty, -jnp.inf, (peak + jnp.log2(divisor)) / LOG2E)


def write(shape: Shape, result, out_smem, out_gmem, *, index, begin: Any = 0) -> None:
    """Send columns of a result on their way to the output, by shared memory.

    Args:
        shape: Of the call.
        result: `[columns, rows]` float32.
        out_smem: `[rows, COLUMNS_AT_ONCE]`.
        out_gmem: `[B·K, R, H]`.
        index: Request and KV head.
        begin: First column.
    """
    rounded = result.astype(out_smem.dtype)
    rows = out_smem.at[pl.ds(0, shape.R)]
    for column in range(0, result.shape[0], COLUMNS_AT_ONCE):
        part = rounded[column : column + COLUMNS_AT_ONCE]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.store_transposed(out_smem, part)
        plgpu.commit_smem()
        columns = pl.ds(begin + column, COLUMNS_AT_ONCE)
        plgpu.copy_smem_to_gmem(rows, out_gmem.at[index, :, columns])


def merge_pieces(shape: Shape, lengths, out, lse, piece_out, piece_lse, firsts):
    """A second kernel: complete output `[B·K, R, H]` and natural lse `[B·K, rows]`.

    Arrays as of `attend`.
    """
    out_ref, lse_ref = jax.new_ref(out), jax.new_ref(lse)
    kernel = plgpu.kernel(
        functools.partial(_merge_body, shape),
        scratch_types=dict(
            out_smem=plgpu.SMEM((shape.rows, COLUMNS_AT_ONCE), out.dtype),
        ),
        grid=(shape.H // COLUMNS_AT_ONCE, shape.K, shape.B),
        grid_names=("part", "head", "request"),
        kernel_name="decode_attention_merge",
        compiler_params=plgpu.COMPILER,
    )
    kernel(lengths, piece_out, piece_lse, firsts, out_ref, lse_ref)
    return jax.freeze(out_ref), jax.freeze(lse_ref)


def _merge_body(
    shape: Shape, lengths_gmem, piece_out, piece_lse, firsts_gmem, out_gmem, lse_gmem, *, out_smem
):
    part, head, request = (lax.axis_index(name) for name in ("part", "head", "request"))
    length = Bounded(lengths_gmem, shape.capacity)[request]
    first_piece, pieces = shape.division.pieces_of(
        request, length, first_unit=firsts_gmem[request], share=firsts_gmem[shape.B]
    )

    @pl.when(pieces != 1)
    def _():
        index, begin = request * shape.K + head, part * COLUMNS_AT_ONCE
        result, lse = merged(
            shape, piece_out, piece_lse, pieces=pieces, begin=begin, columns=COLUMNS_AT_ONCE,
            first_piece=first_piece + head * shape.division.pieces,
        )  # fmt: skip
        write(shape, result, out_smem, out_gmem, index=index, begin=begin)

        @pl.when(part == 0)
        def _():
            plgpu.store(lse_gmem.at[index], lse, optimized=False)

        plgpu.wait_smem_to_gmem(0)
