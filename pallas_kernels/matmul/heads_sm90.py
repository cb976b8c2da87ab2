"""A product's heads on their way out: normalised, rotated, and to queries or into the cache."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels import plgpu
from jaxinfer.pallas_kernels.matmul.buffers import Buffers
from jaxinfer.pallas_kernels.matmul.rotation import Heads, Places, Rotation
from jaxinfer.pallas_kernels.matmul.shape import Shape
from jaxinfer.pallas_kernels.plgpu import pl


def head_buffers(shape: Shape, dtype: Any, rotation: Rotation) -> Buffers:
    """What `HeadTiles` needs."""
    heads = _heads(shape)
    tile = plgpu.SMEM((shape.rows, shape.config.block_n), dtype)
    scratch: dict[str, Any] = {"out_smem": tile, **heads.scratch(shape.rows)}
    if shape.banks == 2:
        scratch["second_smem"] = tile
    beyond = ((0, shape.rows - shape.M), (0, 0))
    angles = heads.angles(rotation.cos, rotation.sin)
    inputs: dict[str, Any] = {}
    inputs["cos"], inputs["sin"] = (jnp.pad(x, beyond).T for x in angles)
    inputs["page"], inputs["slot"] = map(Places.padded, (rotation.page, rotation.slot))
    if rotation.q_norm is not None and rotation.k_norm is not None:
        inputs["q_norm"], inputs["k_norm"] = rotation.q_norm.weight, rotation.k_norm.weight
    inputs["k_pages"], inputs["v_pages"] = map(jax.new_ref, (rotation.k_pages, rotation.v_pages))
    outputs = {"out": jax.ShapeDtypeStruct((shape.M, shape.out_n), dtype)}
    return Buffers(inputs, outputs, scratch)


def _heads(shape: Shape) -> Heads:
    assert shape.heads is not None, "the product ends with a rotation"
    return shape.heads


class HeadTiles:
    """In the kernel, what makes queries, keys and values of the products of a tile."""

    fetches = False  # as of `Columns`

    def __init__(self, shape: Shape, arrays: Mapping[str, Any]):
        """Load what does not depend on the product, from the arrays that `head_buffers` names."""
        self._shape, self._arrays, self._heads = shape, arrays, _heads(shape)
        self._angles = [
            plgpu.load(arrays[name], layout=plgpu.Layout.WGMMA, optimized=False)
            for name in ("cos", "sin")
        ]
        self._places = Places(shape.M, arrays["page"], arrays["slot"])

    def fetch(self, column) -> None:
        """Nothing is needed from memory beside the product."""

    def finish(self, banks, *, column, cta, wave) -> None:
        """Make a head and send it off; arguments as of `Columns.finish`."""
        shape, arrays, heads = self._shape, self._arrays, self._heads
        head = lax.div(column, jnp.int32(heads.H))
        if heads.eps is not None:
            banks = heads.normalised(banks, head, arrays["q_norm"], arrays["k_norm"])
        banks = heads.rotated(banks, head, self._angles, arrays.get("turned_smem"))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        tiles = [arrays["out_smem"], arrays.get("second_smem")][: shape.banks]
        for smem, bank in zip(tiles, banks, strict=True):
            plgpu.store_transposed(smem, bank.astype(smem.dtype))
        plgpu.commit_smem()

        @pl.when(cta + wave * shape.ctas < shape.tiles)
        def _store():
            pages = arrays["k_pages"], arrays["v_pages"]
            heads.store(tiles, head, self._places, arrays["out"], *pages)
