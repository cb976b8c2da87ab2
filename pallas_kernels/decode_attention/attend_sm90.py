"""Every group's share of the keys, with wgmma.

Requests that lie within one share are done with it. Others leave pieces, which the CTA that
finishes the last of them merges, or a second kernel (`Shape.second_pass`).

One warpgroup issues TMA copies of pages into a ring, one computes. With a unified softmax, a CTA
that finds sums it cannot trust computes its whole share once more with the online softmax.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels import plgpu
from jaxinfer.pallas_kernels.decode_attention.merge_sm90 import merged, write
from jaxinfer.pallas_kernels.decode_attention.pages_sm90 import copy_pages, pages_of, zero_values
from jaxinfer.pallas_kernels.decode_attention.plan import Bounded
from jaxinfer.pallas_kernels.decode_attention.shape import Shape
from jaxinfer.pallas_kernels.decode_attention.softmax_sm90 import (
    COLUMNS_AT_ONCE,
    LOG2E,
    Online,
    Piece,
    Unified,
    mask,
    scaled,
    trusted_sums,
)
from jaxinfer.pallas_kernels.plgpu import pl


def attend(shape: Shape, rows, k_pages, v_pages, page_table, lengths, phi, counters):
    """Compute every piece; one that is all of a request is its result.

    Args:
        shape: Of the call.
        rows: `[B·K, held_rows, H]` query rows.
        k_pages: `[P, K, p, H]`.
        v_pages: `[P, K, p, H]`.
        page_table: `[B, M]` int32.
        lengths: `[B]` int32.
        phi: `[B·K, rows]` float32, reference of every row in base 2, if `shape.softmax` wants it.
        counters: Reference to `[B·K]` int32 zeros: pieces that are there, while it runs. None with
            a second pass.

    Returns:
        Output `[B·K, R, H]` and natural lse `[B·K, rows]`; with a second pass written for requests
        in one piece; the others' pieces, normalised `[pieces, H, rows]` and base-2 lse
        `[pieces, rows]`, float32; what a second pass finds them by: `[B + 1]` int32, the number of
        each request's first unit (no entry without units) and last the units of a group; `[CTAs]`
        int32, pieces whose sums were not trusted.
    """
    config, dtype = shape.config, rows.dtype
    pieces = shape.K * shape.division.pieces
    ctas = shape.groups * shape.K
    copies = max(1, config.block // shape.page_size)
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    kv_scratch = plgpu.SMEM((config.stages, config.block, shape.H), dtype, transforms=tiled)
    kernel = plgpu.kernel(
        functools.partial(_body, shape),
        out_type=(
            jax.ShapeDtypeStruct((shape.B * shape.K, shape.R, shape.H), dtype),
            jax.ShapeDtypeStruct((shape.B * shape.K, shape.rows), jnp.float32),
            jax.ShapeDtypeStruct((pieces, shape.H, shape.rows), jnp.float32),
            jax.ShapeDtypeStruct((pieces, shape.rows), jnp.float32),
            jax.ShapeDtypeStruct((shape.B + 1,), jnp.int32),
            jax.ShapeDtypeStruct((ctas,), jnp.int32),
        ),
        scratch_types=dict(
            q_smem=plgpu.SMEM((config.stages, shape.rows, shape.H), dtype, transforms=tiled),
            k_smem=kv_scratch,
            v_smem=kv_scratch,
            p_smem=plgpu.SMEM((shape.rows, config.block), dtype, transforms=tiled),
            out_smem=plgpu.SMEM((shape.rows, COLUMNS_AT_ONCE), dtype),
            violations_smem=plgpu.SMEM((1,), jnp.int32),
            arrived_smem=plgpu.SMEM((1,), jnp.int32),
            k_ready=plgpu.Barrier(num_arrivals=copies + 1, num_barriers=config.stages),
            v_ready=plgpu.Barrier(num_arrivals=copies, num_barriers=config.stages),
            k_free=plgpu.Barrier(num_barriers=config.stages),
            v_free=plgpu.Barrier(num_barriers=config.stages),
            judged=plgpu.Barrier(),
        ),
        grid=(ctas,),
        grid_names=("cta",),
        kernel_name="decode_attention",
        num_threads=2,
        thread_name="role",
        compiler_params=plgpu.COMPILER,
    )
    counting = () if counters is None else (counters,)
    return kernel(rows, k_pages, v_pages, page_table, lengths, phi, *counting)


def _body(
    shape: Shape,
    q_gmem, k_gmem, v_gmem, table_gmem, lengths_gmem, phi_gmem, *refs,
    q_smem, k_smem, v_smem, p_smem, out_smem, violations_smem, arrived_smem,
    k_ready, v_ready, k_free, v_free, judged,
):  # fmt: skip
    counters_gmem, refs = (None, refs) if shape.second_pass else (refs[0], refs[1:])
    out_gmem, lse_gmem, piece_out, piece_lse, firsts_gmem, violations_gmem = refs
    cta = lax.axis_index("cta")
    role = lax.axis_index("role")
    group, head = lax.div(cta, jnp.int32(shape.K)), lax.rem(cta, jnp.int32(shape.K))
    stages = jnp.int32(shape.config.stages)
    division, lengths = shape.division, Bounded(lengths_gmem, shape.capacity)
    start = division.start(lengths, group)
    first_unit, units = (start.request, start.block), start.units
    is_unified = shape.softmax != "online"
    all_rows = plgpu.rows_past_the_end(cta, shape.rows)

    def load(passes: int):
        """Load all units; `passes` were loaded before."""

        def load_unit(i, unit):
            request, block = unit
            slot = lax.rem(i, stages)
            # Read before the wait for a free stage, which the way from memory then overlaps.
            length = lengths[request]
            pages = pages_of(shape, table_gmem, length, request, block)
            following = division.following(lengths, request, block)

            @pl.when(i >= stages)
            def _wait_for_keys():
                plgpu.barrier_wait(k_free.at[slot])

            query = q_gmem.at[request * shape.K + head, all_rows]
            plgpu.copy_gmem_to_smem(query, q_smem.at[slot], k_ready.at[slot])
            valid = length - block * shape.config.block
            copy_pages(shape, k_gmem, k_smem.at[slot], k_ready.at[slot], head, pages, valid)

            @pl.when(i >= stages)
            def _wait_for_values():
                plgpu.barrier_wait(v_free.at[slot])

            copy_pages(shape, v_gmem, v_smem.at[slot], v_ready.at[slot], head, pages, valid)

            if shape.second_pass:

                @pl.when((head == 0) & (block == division.blocks(length)[0]))
                def _note_first():
                    firsts_gmem[request] = start.unit + i - passes * units

            return following

        lax.fori_loop(passes * units, (passes + 1) * units, load_unit, first_unit)

    @pl.when(role == 0)
    def _load():
        plgpu.set_max_registers(40, action="decrease")

        if shape.second_pass:

            @pl.when(cta == 0)
            def _note_share():
                firsts_gmem[shape.B] = start.share

        load(0)
        loaded = units
        if is_unified:
            plgpu.barrier_wait(judged)
            again = violations_smem[0] > 0
            pl.when(again)(functools.partial(load, 1))
            loaded = lax.select(again, 2 * units, units)

        plgpu.drain(k_free, v_free, uses=loaded, stages=shape.config.stages)

    def merge(request, first_piece, pieces):
        index = request * shape.K + head
        result, lse = merged(
            shape, piece_out, piece_lse, pieces=pieces, columns=shape.H,
            first_piece=first_piece + head * division.pieces,
        )  # fmt: skip
        write(shape, result, out_smem, out_gmem, index=index)
        plgpu.store(lse_gmem.at[index], lse, optimized=False)

    def arrive(request, *, first_unit):
        """A piece is stored: merge if it is the last of its request."""
        counters, index = counters_gmem, request * shape.K + head
        assert counters is not None, "there is no second pass"
        plgpu.count_arrival(counters.at[index], arrived_smem)
        first_piece, pieces = division.pieces_of(
            request, lengths[request], first_unit=first_unit, share=start.share
        )

        @pl.when(arrived_smem[0] == pieces - 1)
        def _merge():
            counters[index] = jnp.int32(0)
            merge(request, first_piece, pieces)

    def compute(softmax: Online | Unified, passes: int):
        """Compute all units after `passes` that were computed before; pieces not to be trusted."""

        def attend_unit(i, carry):
            (request, block), acc, sums, is_first, begin, violations = carry
            begin = lax.select(is_first, block, begin)
            slot = lax.rem(i, stages)
            # As in `load`, read before the wait.
            length = lengths[request]
            following = division.following(lengths, request, block)
            plgpu.barrier_wait(k_ready.at[slot])

            def scores(ref):
                plgpu.wgmma(ref, k_smem.at[slot], q_smem.at[slot].transpose((1, 0)))
                return ref[...]

            logits = pl.run_scoped(scores, plgpu.ACC((shape.config.block, shape.rows), jnp.float32))
            plgpu.barrier_arrive(k_free.at[slot])

            logits = mask(shape, scaled(shape, logits), block, length)
            index = request * shape.K + head
            weights, sums, acc = softmax.weigh(logits, sums, acc, is_first, index)
            weights = weights.astype(p_smem.dtype)
            plgpu.store(p_smem.T, plgpu.layout_cast(weights, plgpu.Layout.WGMMA_TRANSPOSED))
            plgpu.commit_smem()
            plgpu.barrier_wait(v_ready.at[slot])
            valid = length - block * shape.config.block
            pl.when(valid < shape.config.block)(
                functools.partial(zero_values, v_smem.at[slot], valid)
            )
            acc = plgpu.wgmma_add(acc, v_smem.at[slot].transpose((1, 0)), p_smem.transpose((1, 0)))
            plgpu.barrier_arrive(v_free.at[slot])

            is_last = (following[0] != request) | (following[1] != block + 1)
            is_last |= i + 1 >= (passes + 1) * units

            def store():
                total = sums.weights.sum(axis=0)
                is_empty = total == 0.0
                divisor = jnp.where(is_empty, 1.0, total)
                result = acc / lax.broadcast_in_dim(divisor, acc.shape, [1])
                lse = jnp.where(is_empty, -jnp.inf, sums.phi + jnp.log2(divisor))
                first, end = division.blocks(length)
                is_whole = (begin == first) & (block + 1 == end)

                @pl.when(is_whole)
                def _result():
                    write(shape, result, out_smem, out_gmem, index=index)
                    plgpu.store(lse_gmem.at[index], lse / LOG2E, optimized=False)

                @pl.when(jnp.logical_not(is_whole))
                def _piece():
                    number = head * division.pieces + group + request
                    plgpu.store(piece_out.at[number], result, optimized=False)
                    plgpu.store(piece_lse.at[number], lse, optimized=False)
                    if not shape.second_pass:
                        arrive(request, first_unit=start.unit + i - (block - first))

                piece = Piece(begin, block + 1, length)
                return violations + softmax.violations(total, acc, piece)

            violations = lax.cond(is_last, store, lambda: violations)
            # A new piece starts from nothing, also after one that is not finite: no product with 0.
            acc = jnp.where(is_last, 0.0, acc)
            sums = softmax.restart(sums, is_last)
            return following, acc, sums, is_last, begin, violations

        acc = plgpu.layout_cast(jnp.zeros((shape.H, shape.rows), jnp.float32), plgpu.Layout.WGMMA)
        carry = (first_unit, acc, softmax.start(), jnp.bool_(True), jnp.int32(0), jnp.int32(0))
        begin, end = passes * units, (passes + 1) * units
        return lax.fori_loop(begin, end, attend_unit, carry)[-1]

    @pl.when(role == 1)
    def _compute():
        plgpu.set_max_registers(208, action="increase")
        if not is_unified:
            compute(Online(shape), 0)
            if not shape.second_pass:

                @pl.loop(group, shape.B, step=shape.groups)
                def _empty(request):
                    first, end = division.blocks(lengths[request])
                    pl.when(first >= end)(lambda: merge(request, jnp.int32(0), jnp.int32(0)))

            plgpu.wait_smem_to_gmem(0)
            return
        phi = phi_gmem if shape.softmax == "unified by phi" else None
        violations = compute(Unified(shape, phi, trusted_sums(q_smem.dtype)), 0)
        violations_smem[0] = violations
        violations_gmem[cta] = violations
        plgpu.barrier_arrive(judged)
        plgpu.wait_smem_to_gmem(0)  # what is computed again must come later

        @pl.when(violations > 0)
        def _again():
            compute(Online(shape), 1)
            plgpu.wait_smem_to_gmem(0)
