"""Rotation and cache write in one launch: one CTA per token, pages updated in place.

Queries and keys go from global memory to registers, are rotated there, and leave through shared
memory; values only pass through shared memory. All stores are TMA copies: one token's keys lie
`p·H` apart in a page, which a strided copy reaches at once.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels import plgpu
from jaxinfer.pallas_kernels.plgpu import pl
from jaxinfer.pallas_kernels.rope_kv_write.places import place

_WARPS, _LANES = 4, 32


def rows_per_tile(num_rows: int, head_dim: int) -> int | None:
    """Heads that the 128 threads rotate at once: 4, 2 or 1; None if no division fits.

    Args:
        num_rows: N + K heads to rotate.
        head_dim: H; every thread needs at least one of the H/2 pairs of a row.
    """
    half = head_dim // 2
    for rows in (4, 2, 1):
        threads = _WARPS // rows * _LANES  # that share a row
        if num_rows % rows == 0 and half % threads == 0:
            return rows
    return None


def _layout(rows: int, half: int) -> plgpu.SomeLayout:
    """`rows` heads × `half` pairs over one warpgroup, neighbouring pairs in one thread."""
    per_warp = half * rows // _WARPS
    vector = per_warp // _LANES
    if rows == _WARPS:
        return plgpu.tiled_layout(
            ((rows, half), (vector,)), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
        )
    if rows == 1:
        return plgpu.tiled_layout(
            ((1, half), (per_warp,), (vector,)), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
        )
    return plgpu.tiled_layout(
        ((rows, half), (per_warp,), (vector,)), warp_dims=(-4, -3), lane_dims=(-2,), vector_dim=-1
    )


@jax.jit  # layers that call alike share one trace and one lowering
def rope_kv_write_mosaic(
    q, k, v, cos, sin, k_pages, v_pages, page_table, start, num_tokens
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Rotate and write with the Hopper kernel; shapes and meaning as in `api.rope_kv_write`."""
    B, T, N, H = q.shape
    K = k.shape[2]
    tokens = B * T
    # Where q, k and v are slices of one projection, XLA folds this back into the projection.
    parts = [x.reshape(B, T, -1) for x in (q, k, v)]
    qkv = jnp.concatenate(parts, axis=-1).reshape(tokens, N + 2 * K, H)
    k_ref, v_ref = jax.new_ref(k_pages), jax.new_ref(v_pages)
    kernel = plgpu.kernel(
        functools.partial(_body, T=T, N=N, K=K, page_size=k_pages.shape[2]),
        out_type=(
            jax.ShapeDtypeStruct((tokens, N, H), q.dtype),
            jax.ShapeDtypeStruct((tokens, K, H), k.dtype),
        ),
        scratch_types=dict(
            rotated=plgpu.SMEM((N + K, H), q.dtype),
            values=plgpu.SMEM((K, H), v.dtype),
            values_ready=plgpu.Barrier(),
        ),
        grid=(tokens,),
        grid_names=("token",),
        kernel_name="rope_kv_write",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    angles = (x.astype(jnp.float32).reshape(tokens, H // 2) for x in (cos, sin))
    q_out, k_out = kernel(qkv, *angles, page_table, start, num_tokens, k_ref, v_ref)
    return (
        q_out.reshape(q.shape), k_out.reshape(k.shape), jax.freeze(k_ref), jax.freeze(v_ref),
    )  # fmt: skip


def _body(
    qkv, cos, sin, page_table, start, num_tokens, k_pages, v_pages, q_out, k_out,
    *, rotated, values, values_ready, T: int, N: int, K: int, page_size: int,
):  # fmt: skip
    token = lax.axis_index("token")
    row, t = lax.div(token, jnp.int32(T)), lax.rem(token, jnp.int32(T))
    plgpu.copy_gmem_to_smem(qkv.at[token, pl.ds(N + K, K)], values, values_ready)

    half = rotated.shape[1] // 2
    tile_rows = rows_per_tile(N + K, 2 * half)
    assert tile_rows is not None, (N, K, half)
    layout = _layout(tile_rows, half)

    def load_half(index):
        source = qkv.at[token, pl.ds(0, N + K), pl.ds(index * half, half)]
        return plgpu.load(source, layout=layout, optimized=False).astype(jnp.float32)

    def load_angle(angle):
        one = plgpu.load(angle.at[token], layout=layout.reduce(0), optimized=False)
        return plgpu.layout_cast(lax.broadcast_in_dim(one, (N + K, half), [1]), layout)

    first, second = load_half(0), load_half(1)
    cosine, sine = load_angle(cos), load_angle(sin)
    rotated[:, pl.ds(0, half)] = (first * cosine - second * sine).astype(rotated.dtype)
    rotated[:, pl.ds(half, half)] = (second * cosine + first * sine).astype(rotated.dtype)
    plgpu.commit_smem()
    keys = rotated.at[pl.ds(N, K)]
    plgpu.copy_smem_to_gmem(rotated.at[pl.ds(0, N)], q_out.at[token])
    plgpu.copy_smem_to_gmem(keys, k_out.at[token])
    plgpu.barrier_wait(values_ready)

    page, slot = place(
        start[row] + t, t < num_tokens[row], lambda column: page_table[row, column],
        page_size=page_size, table_width=page_table.shape[1], num_pages=k_pages.shape[0],
    )  # fmt: skip

    @pl.when(page >= 0)
    def _write():
        plgpu.copy_smem_to_gmem(keys, k_pages.at[page, :, slot])
        plgpu.copy_smem_to_gmem(values, v_pages.at[page, :, slot])

    plgpu.wait_smem_to_gmem(0)
