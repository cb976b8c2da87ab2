"""One CTA per row: the row stays in registers between the sum of squares and the scaling."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels import plgpu

THREADS = 128
_WIDEST = 8  # elements per thread and load: 16 bytes of a 16-bit type


def vector_size(columns: int) -> int:
    """Elements that a thread loads at once: the widest power of two that divides its share."""
    share = columns // THREADS
    return next(width for width in (_WIDEST, 4, 2, 1) if share % width == 0)


@functools.partial(jax.jit, static_argnames="eps")  # shared by all layers
def add_rms_norm_mosaic(
    x: jax.Array, residual: jax.Array | None, weight: jax.Array, *, eps: float
) -> tuple[jax.Array, jax.Array]:
    """Add and normalise with the Hopper kernel; meaning as in `api.add_rms_norm`."""
    D = x.shape[-1]
    rows = x.reshape(-1, D)
    row = jax.ShapeDtypeStruct(rows.shape, x.dtype)
    build = functools.partial(
        plgpu.kernel,
        grid=(rows.shape[0],),
        grid_names=("row",),
        kernel_name="add_rms_norm",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    if residual is None:

        def normalise(x_ref, weight_ref, normed_ref):
            _normalise(x_ref, None, weight_ref, normed_ref, None, eps=eps)

        normed = build(normalise, out_type=row)(rows, weight)
        return normed.reshape(x.shape), x
    body = functools.partial(_normalise, eps=eps)
    normed, total = build(body, out_type=(row, row))(rows, residual.reshape(-1, D), weight)
    return normed.reshape(x.shape), total.reshape(x.shape)


def _normalise(x_ref, residual_ref, weight_ref, normed_ref, total_ref, *, eps: float) -> None:
    D = weight_ref.shape[0]
    row = lax.axis_index("row")
    layout = plgpu.Layout.WG_STRIDED((D,), vec_size=vector_size(D))

    def load(ref):
        return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)

    weight = load(weight_ref)
    total = load(x_ref.at[row])
    if residual_ref is not None:
        rounded = (total + load(residual_ref.at[row])).astype(total_ref.dtype)
        total_ref[row] = rounded
        total = rounded.astype(jnp.float32)
    mean_square = jnp.sum(total * total) / D
    normed_ref[row] = (total * lax.rsqrt(mean_square + eps) * weight).astype(normed_ref.dtype)
