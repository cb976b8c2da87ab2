"""The oracle of `decode_attention`: one request and head at a time, float32, nothing clever."""

import jax
import jax.numpy as jnp


def decode_attention_reference(
    query: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    left_window: int | None = None,
    logits_softcap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attend token by token; shapes and meaning as in `api.decode_attention`.

    Returns:
        Output `[B, T, N, H]` and log-sum-exp `[B, T, N]`, both float32.
    """
    query, k_pages, v_pages = (x.astype(jnp.float32) for x in (query, k_pages, v_pages))
    B, T, N, H = query.shape
    K, page_size = k_pages.shape[1:3]
    S = page_table.shape[1] * page_size
    key_position = jnp.arange(S)

    def one(b, t, n):
        head = n // (N // K)
        # Slots past the row's length are not part of it, whatever they hold.
        held = (key_position < lengths[b])[:, None]
        keys = jnp.where(held, k_pages[page_table[b], head].reshape(S, H), 0)
        values = jnp.where(held, v_pages[page_table[b], head].reshape(S, H), 0)
        logits = keys @ query[b, t, n] * scale
        if logits_softcap is not None:
            logits = logits_softcap * jnp.tanh(logits / logits_softcap)
        position = lengths[b] - T + t
        visible = key_position <= position
        if left_window is not None:
            visible &= key_position >= position - left_window
        logits = jnp.where(visible, logits, -jnp.inf)
        lse = jax.nn.logsumexp(logits)
        weights = jnp.where(visible, jnp.exp(logits - jnp.where(jnp.isinf(lse), 0, lse)), 0)
        return weights @ values, lse

    over_heads = jax.vmap(one, in_axes=(None, None, 0))
    over_tokens = jax.vmap(over_heads, in_axes=(None, 0, None))
    over_rows = jax.vmap(over_tokens, in_axes=(0, None, None))
    with jax.default_matmul_precision("highest"):
        return over_rows(jnp.arange(B), jnp.arange(T), jnp.arange(N))
