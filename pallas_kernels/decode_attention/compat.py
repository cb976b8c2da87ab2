"""For code that used `jax.experimental.pallas.ops.gpu.paged_attention`, which JAX deprecates."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels.arguments import check_ranks
from jaxinfer.pallas_kernels.decode_attention.api import decode_attention


def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_tables: jax.Array,
    lengths: jax.Array | None,
    k_scales_pages: jax.Array | None = None,
    v_scales_pages: jax.Array | None = None,
    *,
    attn_logits_soft_cap: float | None = None,
    **hints: Any,
) -> jax.Array:
    """`decode_attention` under the names, shapes and meaning of JAX's function.

    As there, queries are not scaled: multiply them by 1/sqrt(H) before, if they shall be. Unlike
    there, q and pages have one dtype: convert one of them.

    Args:
        q: `[B, N, H]`, one token of each request.
        k_pages: `[K, P, p, H]`.
        v_pages: `[K, P, p, H]`.
        block_tables: `[B, M]` int32.
        lengths: `[B]` int32; None: every page of the table is full.
        k_scales_pages: None; pages of 8 bits are not supported.
        v_scales_pages: None.
        attn_logits_soft_cap: Logits become c·tanh(logits / c).
        hints: `block_h`, `pages_per_compute_block`, `k_splits`, `num_warps`, `num_stages`,
            `interpret`, `debug` and `mask_value` of JAX's kernel, which mean nothing to ours.

    Returns:
        `[B, N, H]` in the dtype of q.

    Raises:
        ValueError, TypeError: as `decode_attention`; a keyword that JAX's function does not have.
        NotImplementedError: scales were given.

    >>> pages = jnp.ones((1, 4, 16, 8))
    >>> table, lengths = jnp.array([[2, 0]]), jnp.array([20])
    >>> paged_attention(jnp.ones((1, 2, 8)), pages, pages, table, lengths, k_splits=4).shape
    (1, 2, 8)
    """
    unknown = sorted(set(hints) - _HINTS)
    if unknown:
        raise TypeError(f"paged_attention has no argument {unknown[0]!r}")
    if k_scales_pages is not None or v_scales_pages is not None:
        raise NotImplementedError("pages of 8 bits with scales are not supported; convert them")
    check_ranks(
        q=(q, 3), k_pages=(k_pages, 4), v_pages=(v_pages, 4), block_tables=(block_tables, 2)
    )
    if block_tables.shape[0] != q.shape[0]:
        raise ValueError(
            f"block_tables must have one row per request (B={q.shape[0]}); got {block_tables.shape}"
        )
    if lengths is None:
        full = block_tables.shape[1] * k_pages.shape[2]
        lengths = jnp.full((q.shape[0],), full, jnp.int32)
    out = decode_attention(
        q[:, None], k_pages, v_pages, block_tables, lengths,
        scale=1.0, logits_softcap=attn_logits_soft_cap, kv_layout="KPpH",
    )  # fmt: skip
    return out[:, 0]


_HINTS = {
    "block_h", "pages_per_compute_block", "k_splits", "num_warps", "num_stages", "interpret",
    "debug", "mask_value",
}  # fmt: skip
