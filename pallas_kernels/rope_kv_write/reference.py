"""The oracle of `rope_kv_write`: float32 rotation, one token written at a time."""

import jax
import jax.numpy as jnp


def rotate_half(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate pairs (i, i + H/2) of `[B, T, N, H]` by angles `[B, T, H/2]`, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rope_kv_write_reference(
    q, k, v, cos, sin, k_pages, v_pages, page_table, start, num_tokens
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Rotate and write; shapes and meaning as in `api.rope_kv_write`."""
    num_pages, _, page_size, _ = k_pages.shape
    q_rotated = rotate_half(q, cos, sin).astype(q.dtype)
    k_rotated = rotate_half(k, cos, sin).astype(k.dtype)
    for b in range(k.shape[0]):
        for t in range(int(num_tokens[b])):
            column, slot = divmod(int(start[b]) + t, page_size)
            if not 0 <= column < page_table.shape[1]:
                continue
            page = int(page_table[b, column])
            if not 0 <= page < num_pages:
                continue
            k_pages = k_pages.at[page, :, slot].set(k_rotated[b, t])
            v_pages = v_pages.at[page, :, slot].set(v[b, t])
    return q_rotated, k_rotated, k_pages, v_pages
