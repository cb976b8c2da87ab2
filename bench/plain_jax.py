"""The peer of the end-to-end benchmarks: a decoder as one writes it in plain JAX.

Contiguous cache, `jax.nn.dot_product_attention`, layers unrolled, one jitted step with a donated
cache, greedy. All rows have the same length, which spares it a scatter and a page table.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxinfer.models.decoder import Decoder
from jaxinfer.models.layers import DecoderLayer
from jaxinfer.models.rope import rope_angles

Kernel = Literal["xla", "cudnn"]
Cache = list[tuple[jax.Array, jax.Array]]


def new_cache(model: Decoder, *, batch_size: int, max_len: int) -> Cache:
    """Keys and values `[B, S, K, H]` of every layer."""
    config = model.config
    shape = (batch_size, max_len, config.num_kv_heads, config.head_dim)
    dtype = model.embed[...].dtype

    def zeros() -> jax.Array:
        return jnp.zeros(shape, dtype)

    return [(zeros(), zeros()) for _ in range(config.num_layers)]


def forward(
    model: Decoder, tokens: jax.Array, cache: Cache, length: jax.Array, *, kernel: Kernel
) -> tuple[jax.Array, Cache]:
    """Append `tokens [B, T]` behind `length` tokens; logits `[B, V]` after the last, and cache.

    A prompt (T > 1) must come first: it attends to itself alone.
    """
    B, T = tokens.shape
    positions = jnp.broadcast_to(length + jnp.arange(T, dtype=jnp.int32), (B, T))
    angles = rope_angles(model.config, positions, local=False)
    x = model.embed[...][tokens]
    updated = []
    for layer, kv in zip(model.layers, cache, strict=True):
        x, kv = _layer(layer, x, angles, kv, length, kernel)
        updated.append(kv)
    x = _norm(x[:, -1], model.final_norm)
    head = model.embed[...].T if model.lm_head is None else model.lm_head[...]
    return jnp.matmul(x, head, preferred_element_type=jnp.float32), updated


class Greedy:
    """A compiled step that takes the likeliest next token of every row."""

    def __init__(self, model: Decoder, kernel: Kernel):
        """Flatten the weights once: walking a module tree takes longer than a small step."""
        self._weights, structure = jax.tree.flatten(model)

        def step(weights, tokens, cache, length):
            model = jax.tree.unflatten(structure, weights)
            logits, cache = forward(model, tokens, cache, length, kernel=kernel)
            best = jnp.argmax(logits, axis=-1).astype(jnp.int32)[:, None]
            return best, cache, length + tokens.shape[1]

        self._step = jax.jit(step, donate_argnums=2)

    def __call__(
        self, tokens: jax.Array, cache: Cache, length: jax.Array
    ) -> tuple[jax.Array, Cache, jax.Array]:
        """Next tokens `[B, 1]`, the cache and its new length; the old cache is gone."""
        return self._step(self._weights, tokens, cache, length)


def _layer(layer: DecoderLayer, x, angles, kv, length, kernel: Kernel):
    attention = layer.attention
    config = attention.config
    B, T, _ = x.shape
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    qkv = _norm(x, layer.attn_norm) @ attention.qkv_proj[...]
    q, k, v = jnp.split(qkv, [N * H, (N + K) * H], axis=-1)
    q, k = _rotate(q.reshape(B, T, N, H), angles), _rotate(k.reshape(B, T, K, H), angles)
    v = v.reshape(B, T, K, H)
    keys, values = (
        jax.lax.dynamic_update_slice(old, new, (0, length, 0, 0))
        for old, new in zip(kv, (k, v), strict=True)
    )
    attend = functools.partial(jax.nn.dot_product_attention, implementation=kernel)
    if T > 1:
        out = attend(q, k, v, is_causal=True)
    else:
        held = jnp.full((B,), length + 1, jnp.int32)
        out = attend(q, keys, values, key_value_seq_lengths=held)
    x = x + out.reshape(B, T, N * H) @ attention.o_proj[...]
    gate, up = jnp.split(_norm(x, layer.mlp_norm) @ layer.mlp.gate_up_proj[...], 2, axis=-1)
    return x + (jax.nn.silu(gate) * up) @ layer.mlp.down_proj[...], (keys, values)


def _norm(x: jax.Array, norm: Any) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + norm.eps)
    return (wide * norm.weight[...].astype(jnp.float32)).astype(x.dtype)


def _rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    cos, sin = (angle[:, :, None] for angle in angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
