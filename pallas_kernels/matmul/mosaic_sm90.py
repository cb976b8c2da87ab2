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

from jaxinfer.pallas_kernels import plgpu
from jaxinfer.pallas_kernels.matmul.epilogue import Gate, gated
from jaxinfer.pallas_kernels.matmul.norm import Norm, Tokens, UndividedNorm
from jaxinfer.pallas_kernels.matmul.rotation import Places, Rotation
from jaxinfer.pallas_kernels.matmul.shape import CLUSTER, Config, Shape, num_ctas
from jaxinfer.pallas_kernels.plgpu import pl

__all__ = ["Config", "matmul_mosaic", "num_ctas"]

# Layout inference of the newer semantics finds no layout for the transposed store used here.
_COMPILER = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)
_SUMS = 64  # tiles whose squares are added at once: the rows of wgmma


# Layers that call alike share one trace and one lowering.
@functools.partial(jax.jit, static_argnames=("transposed", "gate", "config", "num_sms"))
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
        heads=None if rotation is None else rotation.heads_of(config),
        eps=0.0 if undivided is None else undivided.eps,
        square_tiles=0 if undivided is None else undivided.tiles, config=config, num_sms=num_sms,
    )  # fmt: skip
    dtype = tokens.dtype
    if shape.rows > 8:  # a tiled copy reads past the end of an array only if it is less than a tile
        tokens = jnp.pad(tokens, ((0, shape.rows - shape.M), (0, 0)))
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    tile = (config.block_n, config.block_k)
    stages = config.stages
    scratch: dict[str, Any] = dict(
        x_smem=plgpu.SMEM((stages, shape.rows, config.block_k), dtype, transforms=tiled),
        w_smem=plgpu.SMEM(
            (stages, shape.banks, *(tile if transposed else tile[::-1])), dtype, transforms=tiled
        ),
        out_smem=plgpu.SMEM((shape.rows, config.block_n), dtype),
        ready=plgpu.Barrier(num_arrivals=1 + shape.banks, num_barriers=stages),
        # A stage is free when all CTAs that its tokens were sent to have used it.
        free=plgpu.ClusterBarrier(collective_axes=(CLUSTER,), num_barriers=stages)
        if config.cluster > 1
        else plgpu.Barrier(num_barriers=stages),
    )
    result = jax.ShapeDtypeStruct((shape.M, shape.out_n), dtype)
    outputs = {"out": result}
    inputs: dict[str, Any] = {"x": tokens, "weight": weight}
    if undivided is not None:
        inputs["squares"] = undivided.squares
    if bias is not None:
        inputs["bias"] = bias
    if residual is not None:
        inputs["residual"] = residual.reshape(-1, shape.out_n)
        scratch["residual_smem"] = plgpu.SMEM((shape.rows, config.block_n), dtype)
        scratch["residual_ready"] = plgpu.Barrier()
    if norm is not None:
        inputs["norm"] = norm.weight
        scratch["values_smem"] = plgpu.SMEM((shape.rows, config.block_n), dtype)
        sums = -(-shape.tiles // _SUMS) * _SUMS
        outputs["values"] = result
        # As wide as any tiling of the next product pads these tokens.
        outputs["sums"] = jax.ShapeDtypeStruct((sums, -(-shape.M // 16) * 16), jnp.float32)
    if rotation is not None:
        if shape.banks == 2:
            scratch["second_smem"] = plgpu.SMEM((shape.rows, config.block_n), dtype)
        heads = shape.heads
        assert heads is not None, "there is a rotation"
        scratch |= heads.scratch(shape.rows)
        beyond = ((0, shape.rows - shape.M), (0, 0))
        angles = heads.angles(rotation.cos, rotation.sin)
        inputs["cos"], inputs["sin"] = (jnp.pad(x, beyond).T for x in angles)
        inputs["page"], inputs["slot"] = map(Places.padded, (rotation.page, rotation.slot))
        if rotation.q_norm is not None and rotation.k_norm is not None:
            inputs["q_norm"], inputs["k_norm"] = rotation.q_norm.weight, rotation.k_norm.weight
        inputs["k_pages"], inputs["v_pages"] = (
            jax.new_ref(x) for x in (rotation.k_pages, rotation.v_pages)
        )
    exchange = shape.partial or shape.swap
    if exchange is not None:
        scratch |= exchange.scratch()
        outputs |= exchange.outputs(shape.ctas)
    members = config.cluster * config.split * (1 + config.halves)
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
        compiler_params=_COMPILER,
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


def _body(
    shape: Shape, names: tuple[str, ...], *refs, x_smem, w_smem, out_smem, ready, free,
    residual_smem: Any = None, residual_ready: Any = None, values_smem: Any = None,
    second_smem: Any = None, turned_smem: Any = None, mailbox: Any = None, arrived: Any = None,
):  # fmt: skip
    gmem = dict(zip(names, refs, strict=True))
    x_gmem, w_gmem, out_gmem = gmem["x"], gmem["weight"], gmem["out"]
    config = shape.config
    cta = lax.axis_index("cluster")
    if config.cluster > 1:
        cta = cta * config.cluster + lax.axis_index(CLUSTER)
    role = lax.axis_index("role")
    stages, k_steps = jnp.int32(config.stages), jnp.int32(shape.k_steps)
    part = lax.axis_index(CLUSTER) if config.split > 1 else jnp.int32(0)
    is_first = part == 0
    half = lax.axis_index(CLUSTER) if config.halves else jnp.int32(0)
    if config.split > 1:
        # Neighbours in depth go to different CTAs: together they read a piece of memory in order.
        k_steps = lax.div(k_steps - part + (config.split - 1), jnp.int32(config.split))
    steps = shape.waves * k_steps

    def first_column(wave):
        """Of the CTA's tile; CTAs without one go along, so that their cluster stays in step."""
        column = shape.column(lax.min(cta + wave * shape.ctas, jnp.int32(shape.tiles - 1)))
        return column + half * config.block_n if config.halves else column

    @pl.when(role == 0)
    def _load():
        plgpu.set_max_registers(40, action="decrease")
        # Not a constant: of fewer than 8 tokens it reaches past the end, which a constant may not.
        all_rows = pl.ds(lax.min(cta, jnp.int32(0)), shape.rows)
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

        # Every completed phase of a barrier must have been observed when the kernel ends.
        @pl.loop(lax.max(steps - stages, 0), steps)
        def _drain(i):
            plgpu.barrier_wait(free.at[lax.rem(i, stages)])

    @pl.when(role == 1)
    def _multiply():
        plgpu.set_max_registers(232, action="increase")
        # Loaded now, used after the product: nobody waits for them.
        squares = _squares(shape, gmem["squares"]) if "squares" in gmem else None
        angles, places = [], None
        if shape.heads is not None:
            angles = [
                plgpu.load(gmem[name], layout=plgpu.Layout.WGMMA, optimized=False)
                for name in ("cos", "sin")
            ]
            places = Places(shape.M, gmem["page"], gmem["slot"])

        def finish(banks, wave, column):
            """What follows the product, and the way to global memory."""
            out_rows = pl.ds(0, shape.M)
            columns = pl.ds(column, config.block_n)
            if squares is not None:
                scale = lax.rsqrt(squares.sum(axis=0) / shape.K + shape.eps)
                banks = [bank * lax.broadcast_in_dim(scale, bank.shape, [1]) for bank in banks]
            if "bias" in gmem:
                banks = [
                    bank + _of_columns(gmem["bias"], column + i * shape.between_banks, bank.shape)
                    for i, bank in enumerate(banks)
                ]
            if shape.heads is not None:
                head = lax.div(column, jnp.int32(shape.heads.H))
                if shape.swap is not None:
                    other = shape.swap.swap(
                        banks[0], gmem.get("mailbox", mailbox), arrived, cluster=cta, time=wave
                    )
                    is_second = half == 1
                    banks = [
                        jnp.where(is_second, other, banks[0]),
                        jnp.where(is_second, banks[0], other),
                    ]
                if shape.heads.eps is not None:
                    banks = shape.heads.normalised(banks, head, gmem["q_norm"], gmem["k_norm"])
                banks = shape.heads.rotated(banks, head, angles, turned_smem)
                if shape.swap is not None:
                    banks = [jnp.where(half == 1, banks[1], banks[0])]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                tiles = [out_smem, second_smem][: shape.banks]
                for tile, bank in zip(tiles, banks, strict=True):
                    _stage(tile, bank.astype(tile.dtype))
                plgpu.commit_smem()

                @pl.when(cta + wave * shape.ctas < shape.tiles)
                def _store_head():
                    assert shape.heads is not None, "asked above"
                    pages = gmem["k_pages"], gmem["v_pages"]
                    shape.heads.store(tiles, head, places, out_gmem, *pages, first=half)

                return
            result = banks[0] if shape.gate is None else gated(shape.gate, *banks)
            if "residual" in gmem:
                plgpu.barrier_wait(residual_ready)
                before = plgpu.load(residual_smem.T, layout=plgpu.Layout.WGMMA, optimized=False)
                result = result + before.astype(jnp.float32)
            result = result.astype(out_smem.dtype)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            _stage(out_smem, result)
            sums = None
            if "norm" in gmem:
                rounded = result.astype(jnp.float32)
                weight = _of_columns(gmem["norm"], column, rounded.shape)
                _stage(values_smem, (rounded * weight).astype(out_smem.dtype))
                sums = (rounded * rounded).sum(axis=0)
            plgpu.commit_smem()

            @pl.when(cta + wave * shape.ctas < shape.tiles)
            def _store():
                plgpu.copy_smem_to_gmem(out_smem.at[out_rows], out_gmem.at[:, columns])
                if sums is not None:
                    plgpu.copy_smem_to_gmem(values_smem.at[out_rows], gmem["values"].at[:, columns])
                    here = gmem["sums"].at[cta + wave * shape.ctas, pl.ds(0, shape.rows)]
                    plgpu.store(here, sums, optimized=False)

        @pl.loop(0, shape.waves)
        def _tile(wave):
            first_step = wave * k_steps
            column = first_column(wave)
            if "residual" in gmem:

                @pl.when(is_first)
                def _fetch():
                    plgpu.copy_gmem_to_smem(
                        gmem["residual"].at[:, pl.ds(column, config.block_n)],
                        residual_smem.at[pl.ds(0, shape.M)],
                        residual_ready,
                    )

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
            box = gmem.get("mailbox", mailbox)

            @pl.when(part > 0)
            def _hand_over():
                partial.send(banks, box, arrived, cluster=cta)

            @pl.when(is_first)
            def _take():
                finish(partial.receive(banks, box, arrived, cluster=cta), wave, column)

        plgpu.wait_smem_to_gmem(0)


def _stage(smem, value) -> None:
    """Put a tile where a copy to global memory takes it from."""
    value = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.store(smem.T, value, optimized=False)


def _squares(shape: Shape, squares):
    """`[64, rows]` whose columns add up to the squares of every token."""
    total = None
    for block in range(squares.shape[0] // _SUMS):
        here = squares.at[pl.ds(block * _SUMS, _SUMS), pl.ds(0, shape.rows)]
        sums = plgpu.load(here, layout=plgpu.Layout.WGMMA, optimized=False)
        if (present := shape.square_tiles - block * _SUMS) < _SUMS:
            tile = plgpu.broadcasted_iota(jnp.int32, sums.shape, 0, layout=plgpu.Layout.WGMMA)
            sums = jnp.where(tile < present, sums, 0.0)
        total = sums if total is None else total + sums
    return total


def _of_columns(gmem, column, shape):
    """A number for each of a tile's columns, float32, the same for all tokens."""
    along = plgpu.Layout.WGMMA.reduce(1)
    values = plgpu.load(gmem.at[pl.ds(column, shape[0])], layout=along, optimized=False)
    return lax.broadcast_in_dim(values.astype(jnp.float32), shape, [0])
