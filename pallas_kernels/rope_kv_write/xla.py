"""`rope_kv_write` in plain JAX: an elementwise fusion and two scatters."""

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels.rope_kv_write.places import places
from jaxinfer.pallas_kernels.rope_kv_write.reference import rotate_half


def rope_kv_write_xla(
    q, k, v, cos, sin, k_pages, v_pages, page_table, start, num_tokens
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Rotate and write; shapes and meaning as in `api.rope_kv_write`."""
    B, T = k.shape[:2]
    q = rotate_half(q, cos, sin).astype(q.dtype)
    k = rotate_half(k, cos, sin).astype(k.dtype)
    page, slot = places(page_table, start, num_tokens, T=T, pages=k_pages)

    def write(pages, new):
        new = new.reshape(B * T, *new.shape[2:])
        # Page -1 is none, not the last one: its tokens are dropped.
        return (
            jnp.asarray(pages)
            .at[page.reshape(-1), :, slot.reshape(-1)]
            .set(new, mode="drop", wrap_negative_indices=False)
        )

    return q, k, write(k_pages, k), write(v_pages, v)
