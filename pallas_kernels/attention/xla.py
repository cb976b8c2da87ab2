"""Attention in plain JAX, block by block with an online softmax: memory linear in T and S."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels.attention.mask import Visibility

Q_BLOCK = 512
K_BLOCK = 1024


def attention_xla(
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
        Output `[B, T, N, H]` in the query's dtype and log-sum-exp `[B, T, N]` float32.
    """
    B, T, N, H = query.shape
    K = key.shape[2]
    grouped = query.reshape(B, T, K, N // K, H)
    q_block, k_block = min(Q_BLOCK, T), min(K_BLOCK, key.shape[1])
    S = key.shape[1]
    grouped = _pad(grouped, q_block)
    key, value = _pad(key, k_block), _pad(value, k_block)
    # Gradients compute blocks again instead of keeping logits, which would take T·S.
    attend = jax.checkpoint(
        functools.partial(
            _query_block, key=key, value=value, num_keys=S, k_block=k_block,
            visibility=visibility, scale=scale, softcap=logits_softcap,
        )
    )  # fmt: skip
    starts = jnp.arange(0, grouped.shape[1], q_block, dtype=jnp.int32)
    if len(starts) == 1:
        out, lse = attend(grouped, starts[0])
    else:
        blocks = grouped.reshape(B, len(starts), q_block, *grouped.shape[2:]).swapaxes(0, 1)
        out, lse = lax.map(lambda block: attend(*block), (blocks, starts))
        out = out.swapaxes(0, 1).reshape(B, -1, N, H)
        lse = lse.swapaxes(0, 1).reshape(B, -1, N)
    return out.reshape(B, -1, N, H)[:, :T].astype(query.dtype), lse[:, :T]


def _pad(x: jax.Array, block: int) -> jax.Array:
    missing = -x.shape[1] % block
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) if missing else x


def _query_block(
    query, start, *, key, value, num_keys, k_block, visibility: Visibility, scale, softcap
):
    """One block of queries `[B, t, K, G, H]` at token `start` against all keys."""
    B, t, K, G, H = query.shape
    tokens = start + jnp.arange(t, dtype=jnp.int32)

    def step(carry, first):
        acc, total, peak = carry
        keys = lax.dynamic_slice_in_dim(key, first, k_block, axis=1)
        values = lax.dynamic_slice_in_dim(value, first, k_block, axis=1)
        index = first + jnp.arange(k_block, dtype=jnp.int32)
        logits = jnp.einsum("btkgh,bskh->bkgts", query, keys, preferred_element_type=jnp.float32)
        logits = logits * jnp.float32(scale)
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        visible = visibility.mask(tokens, index) & (index < num_keys)
        logits = jnp.where(visible[:, None, None], logits, -jnp.inf)
        new_peak = jnp.maximum(peak, logits.max(axis=-1))
        safe = jnp.where(jnp.isinf(new_peak), 0.0, new_peak)
        weights = jnp.exp(logits - safe[..., None])
        correction = jnp.exp(peak - safe)
        if visibility.key_lengths is not None:  # 0 · NaN past the end would poison the sum
            held = (index < visibility.key_lengths[:, None])[:, :, None, None]
            values = jnp.where(held, values, 0)
        part = jnp.einsum(
            "bkgts,bskh->bkgth",
            weights.astype(values.dtype),
            values,
            preferred_element_type=jnp.float32,
        )
        acc = acc * correction[..., None] + part
        return acc, total * correction + weights.sum(axis=-1), new_peak

    init = (
        jnp.zeros((B, K, G, t, H), jnp.float32),
        jnp.zeros((B, K, G, t), jnp.float32),
        jnp.full((B, K, G, t), -jnp.inf, jnp.float32),
    )
    if key.shape[1] == k_block:
        acc, total, peak = step(init, jnp.int32(0))
    else:
        begin, end = visibility.key_range(start, t, num_keys)
        zero = _zero_of(query, key, value)

        @jax.checkpoint
        def step_if_seen(carry, first):
            seen = (first < end) & (first + k_block > begin)
            return lax.cond(seen, step, lambda carry, _: carry, carry, first), None

        # A loop over the blocks that are seen alone would have no gradient.
        firsts = jnp.arange(0, key.shape[1], k_block, dtype=jnp.int32)
        (acc, total, peak), _ = lax.scan(step_if_seen, tuple(x + zero for x in init), firsts)
    seen = total > 0
    out = acc / jnp.where(seen, total, 1.0)[..., None]
    safe_peak, safe_total = jnp.where(seen, peak, 0.0), jnp.where(seen, total, 1.0)
    lse = jnp.where(seen, safe_peak + jnp.log(safe_total), -jnp.inf)
    out = out.transpose(0, 3, 1, 2, 4).reshape(B, t, K * G, H)
    return out, lse.transpose(0, 3, 1, 2).reshape(B, t, K * G)


def _zero_of(*arrays: jax.Array) -> jax.Array:
    """0, but inside `shard_map` a value that may differ wherever one of the arrays may."""
    is_zero = functools.reduce(jnp.logical_or, (array.ravel()[0] == 0 for array in arrays))
    return jnp.where(is_zero, 0.0, 0.0).astype(jnp.float32)
