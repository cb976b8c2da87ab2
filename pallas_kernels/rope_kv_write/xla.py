"""`rope_kv_write` in plain JAX: an elementwise fusion and two scatters."""

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels.rope_kv_write.reference import rotate_half


def rope_kv_write_xla(
    q, k, v, cos, sin, k_pages, v_pages, page_table, start, num_tokens
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Rotate and write; shapes and meaning as in `api.rope_kv_write`."""
    B, T = k.shape[:2]
    num_pages, _, page_size, _ = k_pages.shape
    q = rotate_half(q, cos, sin).astype(q.dtype)
    k = rotate_half(k, cos, sin).astype(k.dtype)
    token = jnp.arange(T, dtype=jnp.int32)
    position = start[:, None] + token
    column = jnp.clip(position // page_size, 0, page_table.shape[1] - 1)
    page = jnp.take_along_axis(page_table, column, axis=1)
    # Tokens past the row's end go to a page that does not exist, and are dropped there.
    page = jnp.where(token < num_tokens[:, None], page, num_pages).reshape(-1)
    slot = (position % page_size).reshape(-1)

    def write(pages, new):
        return pages.at[page, :, slot].set(new.reshape(B * T, *new.shape[2:]), mode="drop")

    return q, k, write(k_pages, k), write(v_pages, v)
