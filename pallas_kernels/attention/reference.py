"""The oracle of `attention`: all scores at once, float32."""

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels.attention.mask import Visibility


def attention_reference(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visibility: Visibility,
    *,
    scale: float,
    logits_softcap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attend over contiguous keys; shapes and meaning as in `api.attention`.

    Returns:
        Output `[B, T, N, H]` and log-sum-exp `[B, T, N]`, both float32.
    """
    T, N = query.shape[1:3]
    S, K = key.shape[1:3]
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    key, value = visibility.clear_padding(key), visibility.clear_padding(value)
    with jax.default_matmul_precision("highest"):
        key, value = (jnp.repeat(x, N // K, axis=2) for x in (key, value))
        logits = jnp.einsum("btnh,bsnh->bnts", query, key) * scale
        if logits_softcap is not None:
            logits = logits_softcap * jnp.tanh(logits / logits_softcap)
        visible = visibility.mask(jnp.arange(T), jnp.arange(S))[:, None]
        logits = jnp.where(visible, logits, -jnp.inf)
        lse = jax.nn.logsumexp(logits, axis=-1)
        finite = jnp.where(jnp.isinf(lse), 0.0, lse)[..., None]
        weights = jnp.where(visible, jnp.exp(logits - finite), 0.0)
        out = jnp.einsum("bnts,bsnh->btnh", weights, value)
    return out, lse.transpose(0, 2, 1)
