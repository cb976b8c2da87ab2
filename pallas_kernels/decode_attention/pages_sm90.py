"""From pages in global memory to a block of keys or values in shared memory."""

import functools

import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels import plgpu
from jaxinfer.pallas_kernels.decode_attention.layout import tokens_at
from jaxinfer.pallas_kernels.decode_attention.shape import Shape
from jaxinfer.pallas_kernels.plgpu import pl


def pages_of(shape: Shape, table, length, request, block):
    """Page number and first slot of every page-sized part of a block of keys."""
    block_keys = shape.config.block
    if shape.page_size >= block_keys:
        per_page = shape.page_size // block_keys
        page = table[request, lax.div(block, jnp.int32(per_page))]
        return [(page, lax.rem(block, jnp.int32(per_page)) * block_keys)]
    # Entries past the row's length may hold anything: name its last page again instead.
    per_block = block_keys // shape.page_size
    last = lax.div(length - 1, jnp.int32(shape.page_size))
    return [(table[request, lax.min(block * per_block + j, last)], 0) for j in range(per_block)]


def copy_pages(shape: Shape, pages_gmem, tile_smem, ready, head, pages, valid) -> None:
    """Copy a block of keys or values, of which the first `valid` are wanted.

    At the end of a request only the wanted part is copied, rounded up to a power of two: reading
    whole blocks there would cost 3 % of the traffic at a thousand tokens. The rest of the tile
    holds anything: logits there are masked, values are zeroed before use.
    """
    part = min(shape.page_size, shape.config.block)
    sizes = [size for size in (16, 32, 64) if size < part] + [part]
    for j, (page, slot) in enumerate(pages):
        wanted = valid - j * part

        def copy(size, page=page, slot=slot, j=j):
            source = tokens_at(
                pages_gmem, shape.kv_layout, page=page, head=head, tokens=pl.ds(slot, size)
            )
            plgpu.copy_gmem_to_smem(source, tile_smem.at[pl.ds(j * part, size)], ready)

        pl.when(wanted <= 0)(functools.partial(plgpu.barrier_arrive, ready))
        for below, size in zip([0, *sizes[:-1]], sizes, strict=True):
            chosen = wanted > below
            if size != part:
                chosen &= wanted <= size
            pl.when(chosen)(functools.partial(copy, size))


def zero_values(tile_smem, valid) -> None:
    """Zero the rows of a block past the request's keys: their weights are 0, but 0 · NaN is NaN."""
    keys, head_dim = tile_smem.shape
    for column in range(0, head_dim, 64):
        part = tile_smem.at[:, pl.ds(column, 64)]
        values = plgpu.load(part, layout=plgpu.Layout.WGMMA)
        key = plgpu.broadcasted_iota(jnp.int32, (keys, 64), 0, layout=plgpu.Layout.WGMMA)
        part[...] = jnp.where(key < valid, values, jnp.zeros_like(values))
    plgpu.commit_smem()
