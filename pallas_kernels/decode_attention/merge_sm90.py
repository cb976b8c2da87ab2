"""The second pass: merges the pieces of requests that have several, and answers for empty ones."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels import plgpu
from jaxinfer.pallas_kernels.decode_attention.shape import Shape
from jaxinfer.pallas_kernels.decode_attention.softmax_sm90 import COLUMNS_AT_ONCE, COMPILER, LOG2E
from jaxinfer.pallas_kernels.plgpu import pl

_GROUP = 4  # pieces whose loads are in flight together


def merge_pieces(shape: Shape, lengths, out, lse, piece_out, piece_lse, firsts):
    """Complete output `[B·K, R, H]` and natural lse `[B·K, rows]`; arrays as of `attend`."""
    out_ref, lse_ref = jax.new_ref(out), jax.new_ref(lse)
    kernel = plgpu.kernel(
        functools.partial(_merge_body, shape),
        scratch_types=dict(
            out_smem=plgpu.SMEM((shape.rows, COLUMNS_AT_ONCE), out.dtype),
        ),
        grid=(shape.H // COLUMNS_AT_ONCE, shape.K, shape.B),
        grid_names=("part", "head", "request"),
        kernel_name="decode_attention_merge",
        compiler_params=COMPILER,
    )
    kernel(lengths, piece_out, piece_lse, firsts, out_ref, lse_ref)
    return jax.freeze(out_ref), jax.freeze(lse_ref)


def _merge_body(
    shape: Shape, lengths_gmem, piece_out, piece_lse, firsts_gmem, out_gmem, lse_gmem, *, out_smem
):
    part, head, request = (lax.axis_index(name) for name in ("part", "head", "request"))
    first_piece, pieces = shape.division.pieces_of(
        request, lengths_gmem[request], first_unit=firsts_gmem[request], share=firsts_gmem[shape.B]
    )

    @pl.when(pieces != 1)
    def _():
        first = first_piece + head * shape.division.pieces
        _merge(
            shape, piece_out, piece_lse, out_gmem, lse_gmem, out_smem,
            first_piece=first, pieces=pieces, request=request, head=head, part=part,
        )  # fmt: skip


def _merge(
    shape: Shape, piece_out, piece_lse, out_gmem, lse_gmem, out_smem,
    *, first_piece, pieces, request, head, part,
):  # fmt: skip
    columns = pl.ds(part * COLUMNS_AT_ONCE, COLUMNS_AT_ONCE)

    along_rows = plgpu.Layout.WGMMA.reduce(0)
    tile = (COLUMNS_AT_ONCE, shape.rows)
    peak = plgpu.layout_cast(jnp.full((shape.rows,), -jnp.inf, jnp.float32), along_rows)
    total = plgpu.layout_cast(jnp.zeros((shape.rows,), jnp.float32), along_rows)
    acc = plgpu.layout_cast(jnp.zeros(tile, jnp.float32), plgpu.Layout.WGMMA)

    def add_group(group, carry):
        """Add `_GROUP` pieces at once: their loads wait for memory together."""
        acc, total, peak = carry
        lses, parts = [], []
        for i in range(_GROUP):
            index = group * _GROUP + i
            piece = first_piece + lax.min(index, pieces - 1)
            lse = plgpu.load(piece_lse.at[piece], layout=along_rows, optimized=False)
            absent = jnp.where(index < pieces, 0.0, -jnp.inf).astype(jnp.float32)
            lses.append(lse + absent)
            parts.append(
                plgpu.load(piece_out.at[piece, columns], layout=plgpu.Layout.WGMMA, optimized=False)
            )
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

    groups = lax.div(pieces + _GROUP - 1, jnp.int32(_GROUP))
    acc, total, peak = lax.fori_loop(0, groups, add_group, (acc, total, peak))
    seen = total > 0.0
    divisor = jnp.where(seen, total, 1.0)
    result = acc / lax.broadcast_in_dim(divisor, acc.shape, [1])
    rounded = plgpu.layout_cast(result.astype(out_smem.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.store(out_smem.T, rounded, optimized=False)
    plgpu.commit_smem()
    index = request * shape.K + head
    within = shape.tile_of(index)[1]
    plgpu.copy_smem_to_gmem(
        out_smem.at[pl.ds(within, shape.R)], out_gmem.at[index, pl.ds(0, shape.R), columns]
    )

    @pl.when(part == 0)
    def _():
        lse = jnp.where(seen, (peak + jnp.log2(divisor)) / LOG2E, -jnp.inf)
        plgpu.store(lse_gmem.at[index], lse, optimized=False)

    plgpu.wait_smem_to_gmem(0)
