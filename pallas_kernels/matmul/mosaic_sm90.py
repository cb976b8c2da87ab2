"""Flat product for Hopper: weights fill wgmma's 64 rows, tokens sit in its short side.

    Yᵀ [N, M] = Wᵀ [N, K] · Xᵀ [K, M]

Tokens are padded to 8, not to 64 (FlashDecoding++, section 4, pads to 8 for the same reason). One
warpgroup issues TMA copies of weights and tokens into a ring, one multiplies. A CTA owns whole
columns of the result, and there are as many CTAs as give each the same number of tiles. CTAs of a
cluster load the tokens once for all; or, where tiles alone are too few to keep memory busy, they
share the depth of one tile and add what they have (split-K).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import DTypeLike

from jaxinfer.pallas_kernels import plgpu
from jaxinfer.pallas_kernels.matmul.columns_sm90 import (
    Columns,
    column_buffers,
    load_along_columns,
)
from jaxinfer.pallas_kernels.matmul.epilogue import Gate
from jaxinfer.pallas_kernels.matmul.heads_sm90 import HeadTiles, head_buffers
from jaxinfer.pallas_kernels.matmul.norm import SQUARES_AT_ONCE, Norm, Tokens, UndividedNorm
from jaxinfer.pallas_kernels.matmul.rotation import Rotation
from jaxinfer.pallas_kernels.matmul.shape import CLUSTER, Config, Shape
from jaxinfer.pallas_kernels.plgpu import pl


# Layers that call alike share one trace and one lowering.
@functools.partial(
    jax.jit, static_argnames=("transposed", "gate", "out_dtype", "config", "num_sms")
)
def matmul_mosaic(
    x: Tokens,
    weight: jax.Array,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    norm: Norm | None = None,
    rotation: Rotation | None = None,
    *,
    transposed: bool = False,
    gate: Gate | None = None,
    out_dtype: DTypeLike | None = None,
    config: Config,
    num_sms: int,
) -> tuple[jax.Array, Any]:
    """Multiply with the Hopper kernel; shapes and meaning as in `api`, `with_norm` and `rotation`.

    Returns:
        The product, and with `norm` its `UndividedNorm`; with `rotation` the query heads, and both
        pools with the new keys and values.
    """
    undivided = x if isinstance(x, UndividedNorm) else None
    values: jax.Array = x.values if isinstance(x, UndividedNorm) else x
    *leading, K = values.shape
    tokens = values.reshape(-1, K)
    N = weight.shape[0 if transposed else 1]
    shape = Shape(
        M=tokens.shape[0], K=K, columns=N, transposed=transposed, gate=gate,
        heads=None if rotation is None else rotation.heads,
        eps=0.0 if undivided is None else undivided.eps,
        square_tiles=0 if undivided is None else undivided.tiles, config=config, num_sms=num_sms,
    )  # fmt: skip
    dtype = tokens.dtype
    if shape.rows > 8:  # a tiled copy reads past the end of an array only if it is less than a tile
        tokens = jnp.pad(tokens, ((0, shape.rows - shape.M), (0, 0)))
    inputs: dict[str, Any] = {"x": tokens, "weight": weight}
    if undivided is not None:
        inputs["squares"] = undivided.squares
    if bias is not None:
        inputs["bias"] = bias
    if rotation is None:
        out = dtype if out_dtype is None else out_dtype
        ending = column_buffers(shape, out, residual=residual, norm=norm)
    else:
        ending = head_buffers(shape, dtype, rotation)
    inputs |= ending.inputs
    outputs, scratch = dict(ending.outputs), _ring(shape, dtype) | ending.scratch
    if shape.partial is not None:
        scratch |= shape.partial.scratch()
        outputs |= shape.partial.outputs(shape.ctas)
    members = config.cluster * config.split
    cluster: dict[str, Any] = dict(cluster=(members,), cluster_names=(CLUSTER,))
    kernel = plgpu.kernel(
        functools.partial(_body, shape, (*inputs, *outputs)),
        out_type=tuple(outputs.values()),
        scratch_types=scratch,
        grid=(shape.ctas // config.cluster,),
        grid_names=("cluster",),
        kernel_name="flat_matmul",
        num_threads=2,
        thread_name="role",
        compiler_params=plgpu.COMPILER,
        **(cluster if members > 1 else {}),
    )
    results = dict(zip(outputs, kernel(*inputs.values()), strict=True))
    out = results["out"].reshape(*leading, shape.out_n)
    if rotation is not None:
        return out, tuple(jax.freeze(inputs[name]) for name in ("k_pages", "v_pages"))
    if norm is None:
        return out, None
    values = results["values"].reshape(out.shape)
    return out, UndividedNorm(values, results["sums"], tiles=shape.tiles, eps=norm.eps)


def _ring(shape: Shape, dtype: Any) -> dict[str, Any]:
    """Scratch of the weights and tokens that are on their way."""
    config, stages = shape.config, shape.config.stages
    tile = (config.block_n, config.block_k)
    tile = tile if shape.transposed else tile[::-1]
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return dict(
        x_smem=plgpu.SMEM((stages, shape.rows, config.block_k), dtype, transforms=tiled),
        w_smem=plgpu.SMEM((stages, shape.banks, *tile), dtype, transforms=tiled),
        ready=plgpu.Barrier(num_arrivals=1 + shape.banks, num_barriers=stages),
        # A stage is free when all CTAs that its tokens were sent to have used it.
        free=plgpu.ClusterBarrier(collective_axes=(CLUSTER,), num_barriers=stages)
        if config.cluster > 1
        else plgpu.Barrier(num_barriers=stages),
    )


def _body(shape: Shape, names: tuple[str, ...], *refs, x_smem, w_smem, ready, free, **smem):
    arrays = dict(zip(names, refs, strict=True)) | smem
    x_gmem, w_gmem = arrays["x"], arrays["weight"]
    config = shape.config
    cta = lax.axis_index("cluster")
    if config.cluster > 1:
        cta = cta * config.cluster + lax.axis_index(CLUSTER)
    role = lax.axis_index("role")
    stages, k_steps = jnp.int32(config.stages), jnp.int32(shape.k_steps)
    part = lax.axis_index(CLUSTER) if config.split > 1 else jnp.int32(0)
    is_first = part == 0
    if config.split > 1:
        # Neighbours in depth go to different CTAs: together they read a piece of memory in order.
        k_steps = lax.div(k_steps - part + (config.split - 1), jnp.int32(config.split))
    steps = shape.waves * k_steps

    def first_column(wave):
        """Of the CTA's tile; CTAs without one go along, so that their cluster stays in step."""
        return shape.column(lax.min(cta + wave * shape.ctas, jnp.int32(shape.tiles - 1)))

    @pl.when(role == 0)
    def _load():
        plgpu.set_max_registers(40, action="decrease")
        all_rows = plgpu.rows_past_the_end(cta, shape.rows)
        shared: dict[str, Any] = {"collective_axes": CLUSTER} if config.cluster > 1 else {}

        @pl.loop(0, steps)
        def _step(i):
            slot = lax.rem(i, stages)

            @pl.when(i >= stages)
            def _():
                plgpu.barrier_wait(free.at[slot])

            step = lax.rem(i, k_steps) * config.split + part
            depth = pl.ds(step * config.block_k, config.block_k)
            column = first_column(lax.div(i, k_steps))
            for bank in range(shape.banks):
                columns = pl.ds(column + bank * shape.between_banks, config.block_n)
                tile = w_gmem.at[columns, depth] if shape.transposed else w_gmem.at[depth, columns]
                plgpu.copy_gmem_to_smem(tile, w_smem.at[slot, bank], ready.at[slot])
            plgpu.copy_gmem_to_smem(
                x_gmem.at[all_rows, depth], x_smem.at[slot], ready.at[slot], **shared
            )

        plgpu.drain(free, uses=steps, stages=config.stages)

    @pl.when(role == 1)
    def _multiply():
        plgpu.set_max_registers(232, action="increase")
        # Loaded now, used after the product: nobody waits for them.
        squares = _squares(shape, arrays["squares"]) if "squares" in arrays else None
        ending = (Columns if shape.heads is None else HeadTiles)(shape, arrays)

        def finish(banks, wave, column):
            """What follows the product, and the way to global memory."""
            if squares is not None:
                scale = lax.rsqrt(squares.sum(axis=0) / shape.K + shape.eps)
                banks = [bank * lax.broadcast_in_dim(scale, bank.shape, [1]) for bank in banks]
            if "bias" in arrays:
                first = [column + i * shape.between_banks for i in range(len(banks))]
                banks = [
                    bank + load_along_columns(arrays["bias"], begin, bank.shape)
                    for begin, bank in zip(first, banks, strict=True)
                ]
            ending.finish(banks, column=column, cta=cta, wave=wave)

        @pl.loop(0, shape.waves)
        def _tile(wave):
            first_step = wave * k_steps
            column = first_column(wave)
            if ending.fetches:
                pl.when(is_first)(functools.partial(ending.fetch, column))

            def product(*accumulators):
                @pl.loop(0, k_steps)
                def _step(k):
                    slot = lax.rem(first_step + k, stages)
                    plgpu.barrier_wait(ready.at[slot])
                    tokens = x_smem.at[slot].transpose((1, 0))
                    for bank, accumulator in enumerate(accumulators):
                        tile = w_smem.at[slot, bank]
                        tile = tile if shape.transposed else tile.transpose((1, 0))
                        plgpu.wgmma(accumulator, tile, tokens)
                    # This step's products stay in flight; those of the step before are done.
                    plgpu.wgmma_wait(shape.banks)

                    @pl.when(k > 0)
                    def _():
                        plgpu.barrier_arrive(free.at[lax.rem(first_step + k - 1, stages)])

                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(free.at[lax.rem(first_step + k_steps - 1, stages)])
                return [accumulator[...] for accumulator in accumulators]

            accumulator = plgpu.ACC((config.block_n, shape.rows), jnp.float32)
            banks = pl.run_scoped(product, *[accumulator] * shape.banks)
            if (partial := shape.partial) is None:
                finish(banks, wave, column)
                return
            sums = arrays["mailbox"], arrays["arrived"]

            @pl.when(part > 0)
            def _hand_over():
                partial.send(banks, *sums, cluster=cta)

            @pl.when(is_first)
            def _take():
                finish(partial.receive(banks, *sums, cluster=cta), wave, column)

        plgpu.wait_smem_to_gmem(0)


def _squares(shape: Shape, squares):
    """`[64, rows]` whose columns add up to the squares of every token."""
    total = None
    for block in range(squares.shape[0] // SQUARES_AT_ONCE):
        here = squares.at[pl.ds(block * SQUARES_AT_ONCE, SQUARES_AT_ONCE), pl.ds(0, shape.rows)]
        sums = plgpu.load(here, layout=plgpu.Layout.WGMMA, optimized=False)
        if (present := shape.square_tiles - block * SQUARES_AT_ONCE) < SQUARES_AT_ONCE:
            tile = plgpu.broadcasted_iota(jnp.int32, sums.shape, 0, layout=plgpu.Layout.WGMMA)
            sums = jnp.where(tile < present, sums, 0.0)
        total = sums if total is None else total + sums
    return total
