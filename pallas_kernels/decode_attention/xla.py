"""Decode attention in plain JAX: gathers the pages of every row, then two batched products."""

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels.attention.pages import gather_pages
from jaxinfer.pallas_kernels.decode_attention.layout import KVLayout, as_ours


def decode_attention_xla(
    query: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    left_window: int | None = None,
    logits_softcap: float | None = None,
    kv_layout: KVLayout = "PKpH",
) -> tuple[jax.Array, jax.Array]:
    """Attend over gathered pages; shapes and meaning as in `api.decode_attention`.

    Reads the whole width of `page_table`, so a caller keeps it near the longest row.

    Returns:
        Output `[B, T, N, H]` in the query's dtype and log-sum-exp `[B, T, N]` float32.
    """
    B, T, N, H = query.shape
    k_pages, v_pages = as_ours(k_pages, kv_layout), as_ours(v_pages, kv_layout)
    K = k_pages.shape[1]
    keys, values = gather_pages(k_pages, page_table), gather_pages(v_pages, page_table)
    S = keys.shape[1]
    grouped = query.reshape(B, T, K, N // K, H)
    logits = jnp.einsum(
        "btkgh,bskh->bkgts", grouped, keys, preferred_element_type=jnp.float32
    ) * jnp.float32(scale)
    if logits_softcap is not None:
        logits = logits_softcap * jnp.tanh(logits / logits_softcap)

    key_position = jnp.arange(S, dtype=jnp.int32)
    position = (lengths[:, None] - T + jnp.arange(T, dtype=jnp.int32))[:, :, None]
    visible = key_position <= position
    if left_window is not None:
        visible &= key_position >= position - left_window
    visible = visible[:, None, None]  # [B, 1, 1, T, S]
    logits = jnp.where(visible, logits, -jnp.inf)
    peak = jnp.max(logits, axis=-1, keepdims=True)
    peak = jnp.where(jnp.isinf(peak), 0.0, peak)
    weights = jnp.exp(logits - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    # Slots past the row's length may hold anything: 0 · NaN would poison the sum.
    held = (key_position < lengths[:, None])[:, :, None, None]
    out = jnp.einsum(
        "bkgts,bskh->btkgh",
        weights.astype(values.dtype),
        jnp.where(held, values, 0),
        preferred_element_type=jnp.float32,
    )
    total_bt = jnp.transpose(total, (0, 3, 1, 2, 4))  # [B, T, K, G, 1]
    out = out / jnp.where(total_bt == 0, 1.0, total_bt)
    lse = jnp.transpose((peak + jnp.log(total))[..., 0], (0, 3, 1, 2))
    return out.reshape(B, T, N, H).astype(query.dtype), lse.reshape(B, T, N)
