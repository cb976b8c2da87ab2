"""Flat product for Hopper: weights fill wgmma's 64 rows, tokens sit in its short side.

    Yᵀ [N, M] = Wᵀ [N, K] · Xᵀ [K, M]

Tokens are padded to 8, not to 64 (FlashDecoding++, section 4, pads to 8 for the same reason). One
warpgroup issues TMA copies of weights and tokens into a ring, one multiplies. A CTA owns whole
columns of the result, and there are as many CTAs as give each the same number of tiles. CTAs of a
cluster load the tokens once for all; or, where tiles alone are too few to keep memory busy, they
share the depth of one tile and add what they have (split-K).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels import plgpu
from jaxinfer.pallas_kernels.cluster_sum import ClusterSum
from jaxinfer.pallas_kernels.matmul.epilogue import Gate, gated
from jaxinfer.pallas_kernels.matmul.norm import Norm, Tokens, UndividedNorm
from jaxinfer.pallas_kernels.matmul.rotation import Heads, Rotation
from jaxinfer.pallas_kernels.plgpu import pl

# Layout inference of the newer semantics finds no layout for the transposed store used here.
_COMPILER = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)
_CLUSTER = "in_cluster"
_SUMS = 64  # tiles whose squares are added at once: the rows of wgmma


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Tiling of the kernel.

    Attributes:
        block_n: Columns of the result per tile, 64 or 128; twice as many weights if gated.
        block_k: Depth of a stage of the ring, a multiple of 64.
        stages: Depth of the ring.
        cluster: CTAs that share their loads of tokens: 1 or 2.
        split: CTAs that share the depth of a tile: 1, 2, 4 or 8; only with a cluster of 1.
    """

    block_n: int = 64
    block_k: int = 128
    stages: int = 4
    cluster: int = 1
    split: int = 1

    def __post_init__(self) -> None:
        if self.block_n not in (64, 128):
            raise ValueError(f"block_n must be 64 or 128; got {self.block_n}")
        if self.block_k < 64 or self.block_k % 64:
            raise ValueError(f"block_k must be a multiple of 64; got {self.block_k}")
        if self.stages < 2:
            raise ValueError(f"stages must be at least 2; got {self.stages}")
        if self.cluster not in (1, 2):
            raise ValueError(f"cluster must be 1 or 2; got {self.cluster}")
        if self.split not in (1, 2, 4, 8):
            raise ValueError(f"split must be 1, 2, 4 or 8; got {self.split}")
        if self.split > 1 and self.cluster > 1:
            raise ValueError(f"cluster must be 1 where split is not; got {self.cluster}")

    def rows(self, M: int) -> int:
        """M tokens, padded: 8 for wgmma, and as many for each CTA that loads a part of them."""
        step = 8 * self.cluster
        return -(-M // step) * step

    def smem_bytes(self, M: int, *, gated: bool, tiles: int = 1, sums: bool = False) -> int:
        """Shared memory of one CTA, bytes (16-bit elements), barriers included.

        Args:
            M: Tokens.
            gated: Whether there are two weights per column.
            tiles: Of the result, of a residual and of a norm.
            sums: Whether there are sums over columns, for which Mosaic needs scratch.
        """
        rest = 1024 + (3072 if sums else 0)
        if (partial := self.partial(M, gated=gated)) is not None:
            rest += partial.smem_bytes
        tile = 2 * self.rows(M) * self.block_n
        return self.ring_bytes(M, gated=gated) + tiles * tile + rest

    def ring_bytes(self, M: int, *, gated: bool) -> int:
        """Shared memory of the ring, bytes."""
        weights = (2 if gated else 1) * self.block_n
        return 2 * self.stages * (weights + self.rows(M)) * self.block_k

    def partial(self, M: int, *, gated: bool) -> ClusterSum | None:
        """How the CTAs that share a tile's depth add up; None if there are none."""
        if self.split == 1:
            return None
        shape = (self.block_n, self.rows(M))
        return ClusterSum(axis=_CLUSTER, ctas=self.split, shape=shape, count=2 if gated else 1)

    def accumulators(self, M: int, *, gated: bool) -> int:
        """Registers of a thread that hold sums."""
        return (2 if gated else 1) * self.block_n * self.rows(M) // 128


def num_ctas(tiles: int, *, num_sms: int, cluster: int) -> int:
    """The most CTAs that have the same number of tiles each, rounded up to whole clusters.

    A CTA more than that would leave all others waiting for the few with one tile more.
    """
    groups, places = -(-tiles // cluster), num_sms // cluster
    waves = -(-groups // places)
    return -(-groups // waves) * cluster


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Shape:
    """Static sizes; `columns` of the weight, which tiles share in `banks` of `block_n` each."""

    M: int
    K: int
    columns: int
    transposed: bool
    gate: Gate | None
    heads: Heads | None
    eps: float
    square_tiles: int
    config: Config
    num_sms: int

    @property
    def banks(self) -> int:
        return 1 if self.gate is None and self.heads is None else 2

    @property
    def out_n(self) -> int:
        """Columns of the result."""
        if self.heads is not None:
            return self.heads.N * self.heads.H
        return self.columns // self.banks

    @property
    def between_banks(self) -> int:
        """Columns from a tile's place in one bank to that in the next."""
        return self.columns // 2 if self.heads is None else self.heads.H // 2

    def column(self, tile):
        """First column of a tile in the first bank."""
        return tile * (self.config.block_n if self.heads is None else self.heads.H)

    @property
    def rows(self) -> int:
        """M, padded."""
        return self.config.rows(self.M)

    @property
    def tiles(self) -> int:
        return self.columns // (self.banks * self.config.block_n)

    @property
    def partial(self) -> ClusterSum | None:
        return self.config.partial(self.M, gated=self.banks > 1)

    @property
    def ctas(self) -> int:
        """CTAs that have tiles; of those that share one, the first."""
        if self.config.split > 1:  # the others' sums of a tile are taken once
            return self.tiles
        return num_ctas(self.tiles, num_sms=self.num_sms, cluster=self.config.cluster)

    @property
    def waves(self) -> int:
        """Tiles of each CTA."""
        return -(-self.tiles // self.ctas)

    @property
    def k_steps(self) -> int:
        return self.K // self.config.block_k


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
    shape = _Shape(
        M=tokens.shape[0], K=K, columns=N, transposed=transposed, gate=gate,
        heads=None if rotation is None else rotation.heads,
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
        free=plgpu.ClusterBarrier(collective_axes=(_CLUSTER,), num_barriers=stages)
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
        outputs["sums"] = jax.ShapeDtypeStruct((sums, shape.rows), jnp.float32)
    if rotation is not None:
        scratch["second_smem"] = plgpu.SMEM((shape.rows, config.block_n), dtype)
        beyond = ((0, shape.rows - shape.M), (0, 0))
        inputs["cos"], inputs["sin"] = (
            jnp.pad(x.astype(jnp.float32), beyond).T for x in (rotation.cos, rotation.sin)
        )
        inputs["page"], inputs["slot"] = rotation.page, rotation.slot
        inputs["k_pages"], inputs["v_pages"] = (
            jax.new_ref(x) for x in (rotation.k_pages, rotation.v_pages)
        )
    if shape.partial is not None:
        scratch |= shape.partial.scratch()
        outputs |= shape.partial.outputs(shape.tiles)
    members = config.cluster * config.split
    cluster: dict[str, Any] = dict(cluster=(members,), cluster_names=(_CLUSTER,))
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
    shape: _Shape, names: tuple[str, ...], *refs, x_smem, w_smem, out_smem, ready, free,
    residual_smem: Any = None, residual_ready: Any = None, values_smem: Any = None,
    second_smem: Any = None, mailbox: Any = None, arrived: Any = None,
):  # fmt: skip
    gmem = dict(zip(names, refs, strict=True))
    x_gmem, w_gmem, out_gmem = gmem["x"], gmem["weight"], gmem["out"]
    config = shape.config
    cta = lax.axis_index("cluster")
    if config.cluster > 1:
        cta = cta * config.cluster + lax.axis_index(_CLUSTER)
    role = lax.axis_index("role")
    stages, k_steps = jnp.int32(config.stages), jnp.int32(shape.k_steps)
    part = lax.axis_index(_CLUSTER) if config.split > 1 else jnp.int32(0)
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
        # Not a constant: of fewer than 8 tokens it reaches past the end, which a constant may not.
        all_rows = pl.ds(lax.min(cta, jnp.int32(0)), shape.rows)
        shared: dict[str, Any] = {"collective_axes": _CLUSTER} if config.cluster > 1 else {}

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
        angles, places = [], []
        if shape.heads is not None:
            angles = [
                plgpu.load(gmem[name], layout=plgpu.Layout.WGMMA, optimized=False)
                for name in ("cos", "sin")
            ]
            places = [(gmem["page"][token], gmem["slot"][token]) for token in range(shape.M)]

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
                halves = shape.heads.rotated(banks, head, angles)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                tiles = (out_smem, second_smem)
                for tile, half in zip(tiles, halves, strict=True):
                    _stage(tile, half.astype(tile.dtype))
                plgpu.commit_smem()

                @pl.when(cta + wave * shape.ctas < shape.tiles)
                def _store_head():
                    assert shape.heads is not None, "asked above"
                    pages = gmem["k_pages"], gmem["v_pages"]
                    shape.heads.store(tiles, head, places, out_gmem, *pages)

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
                    gmem["sums"][cta + wave * shape.ctas] = sums

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
    smem.T[...] = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)


def _squares(shape: _Shape, squares):
    """`[64, rows]` whose columns add up to the squares of every token."""
    total = None
    for block in range(squares.shape[0] // _SUMS):
        here = squares.at[pl.ds(block * _SUMS, _SUMS)]
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
