"""A product's columns on their way out: gate, residual, and the norm of what comes next."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels import plgpu
from jaxinfer.pallas_kernels.matmul.buffers import Buffers
from jaxinfer.pallas_kernels.matmul.epilogue import gated
from jaxinfer.pallas_kernels.matmul.norm import SQUARES_AT_ONCE, Norm
from jaxinfer.pallas_kernels.matmul.shape import Shape
from jaxinfer.pallas_kernels.plgpu import pl


def column_buffers(
    shape: Shape, dtype: Any, *, residual: jax.Array | None, norm: Norm | None
) -> Buffers:
    """What `Columns` needs for a result of a dtype; arrays as of `matmul_mosaic`."""
    result = jax.ShapeDtypeStruct((shape.M, shape.out_n), dtype)
    tile = plgpu.SMEM((shape.rows, shape.config.block_n), dtype)
    inputs: dict[str, Any] = {}
    outputs, scratch = {"out": result}, {"out_smem": tile}
    if residual is not None:
        inputs["residual"] = residual.reshape(-1, shape.out_n)
        before = plgpu.SMEM((shape.rows, shape.config.block_n), residual.dtype)
        scratch |= {"residual_smem": before, "residual_ready": plgpu.Barrier()}
    if norm is not None:
        inputs["norm"] = norm.weight
        scratch["values_smem"] = tile
        sums = -(-shape.tiles // SQUARES_AT_ONCE) * SQUARES_AT_ONCE
        outputs["values"] = result
        # As wide as any tiling of the next product pads these tokens.
        outputs["sums"] = jax.ShapeDtypeStruct((sums, -(-shape.M // 16) * 16), jnp.float32)
    return Buffers(inputs, outputs, scratch)


class Columns:
    """In the kernel, what makes the result of the products of a tile."""

    def __init__(self, shape: Shape, arrays: Mapping[str, Any]):
        """Take the arrays that `column_buffers` names."""
        self._shape, self._arrays = shape, arrays

    @property
    def fetches(self) -> bool:
        """Whether something is to be on its way while the product is made."""
        return "residual" in self._arrays

    def fetch(self, column) -> None:
        """Ask for the residual of a tile, which begins at a column of the result."""
        plgpu.copy_gmem_to_smem(
            self._arrays["residual"].at[:, self._columns(column)],
            self._arrays["residual_smem"].at[pl.ds(0, self._shape.M)],
            self._arrays["residual_ready"],
        )

    def finish(self, banks, *, column, cta, wave) -> None:
        """Make a tile of the result and send it off.

        Args:
            banks: `[block_n, rows]` float32, products of its columns.
            column: Its first.
            cta: Number of the CTA, or of those that share its tiles.
            wave: How many tiles it had before. There may be none for it in the last.
        """
        shape, arrays = self._shape, self._arrays
        out_smem = arrays["out_smem"]
        result = banks[0] if shape.gate is None else gated(shape.gate, *banks)
        if self.fetches:
            plgpu.barrier_wait(arrays["residual_ready"])
            residual = arrays["residual_smem"].T
            before = plgpu.load(residual, layout=plgpu.Layout.WGMMA, optimized=False)
            result = result + before.astype(jnp.float32)
        result = result.astype(out_smem.dtype)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.store_transposed(out_smem, result)
        sums = None
        if "norm" in arrays:
            rounded = result.astype(jnp.float32)
            weight = load_along_columns(arrays["norm"], column, rounded.shape)
            plgpu.store_transposed(arrays["values_smem"], (rounded * weight).astype(out_smem.dtype))
            sums = (rounded * rounded).sum(axis=0)
        plgpu.commit_smem()

        tile = cta + wave * shape.ctas

        @pl.when(tile < shape.tiles)
        def _store():
            rows, columns = pl.ds(0, shape.M), self._columns(column)
            plgpu.copy_smem_to_gmem(out_smem.at[rows], arrays["out"].at[:, columns])
            if sums is not None:
                values = arrays["values_smem"].at[rows]
                plgpu.copy_smem_to_gmem(values, arrays["values"].at[:, columns])
                here = arrays["sums"].at[tile, pl.ds(0, shape.rows)]
                plgpu.store(here, sums, optimized=False)

    def _columns(self, column):
        return pl.ds(column, self._shape.config.block_n)


def load_along_columns(gmem, begin, shape: tuple[int, ...]) -> jax.Array:
    """A number for each of a tile's columns, float32, the same for all tokens.

    Args:
        gmem: One for each column of the result.
        begin: Column at which the tile begins.
        shape: `[columns, tokens]` of the tile.
    """
    part = gmem.at[pl.ds(begin, shape[0])]
    values = plgpu.load(part, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
    return lax.broadcast_in_dim(values.astype(jnp.float32), shape, [0])
