"""Which keys a query sees, as data that every implementation reads the same way."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Visibility:
    """Rule for query token t (at position `q_offset + t`) and key j.

    Attributes:
        is_causal: j must not exceed the query's position.
        left: Keys visible before the query's position; None: all.
        right: Keys visible after it; None: all (cut at 0 by `is_causal`).
        q_offset: `[B]` int32 position of query token 0.
        query_lengths: `[B]` int32 valid query tokens, or None: all.
        key_lengths: `[B]` int32 valid keys, or None: all.
    """

    is_causal: bool
    left: int | None
    right: int | None
    q_offset: jax.Array
    query_lengths: jax.Array | None
    key_lengths: jax.Array | None

    def mask(self, t: jax.Array, j: jax.Array) -> jax.Array:
        """Boolean `[B, len(t), len(j)]` for token indices `t` and key indices `j`."""
        position = self.q_offset[:, None, None] + t[None, :, None]
        key = j[None, None, :]
        visible = jnp.ones((self.q_offset.shape[0], t.shape[0], j.shape[0]), bool)
        right = 0 if self.is_causal else self.right
        if right is not None:
            visible &= key <= position + right
        if self.left is not None:
            visible &= key >= position - self.left
        if self.key_lengths is not None:
            visible &= key < self.key_lengths[:, None, None]
        if self.query_lengths is not None:
            visible &= t[None, :, None] < self.query_lengths[:, None, None]
        return visible

    def key_range(self, first: jax.Array, tokens: int, num_keys: int) -> tuple:
        """Keys `[begin, end)` outside of which no query `first … first + tokens - 1` sees any."""
        begin, end = jnp.int32(0), jnp.int32(num_keys)
        right = 0 if self.is_causal else self.right
        if right is not None:
            end = jnp.minimum(end, jnp.max(self.q_offset) + first + tokens + right)
        if self.key_lengths is not None:
            end = jnp.minimum(end, jnp.max(self.key_lengths))
        if self.left is not None:
            begin = jnp.maximum(begin, jnp.min(self.q_offset) + first - self.left)
        return begin, jnp.maximum(end, begin)

    def clear_padding(self, x: jax.Array) -> jax.Array:
        """Keys or values `[B, S, K, H]` with zeros past the lengths: a weight of 0 · NaN is NaN."""
        if self.key_lengths is None:
            return x
        held = jnp.arange(x.shape[1]) < self.key_lengths[:, None]
        return jnp.where(held[:, :, None, None], x, 0)

    def clear_unseen(self, out: jax.Array, num_keys: int) -> jax.Array:
        """Output `[B, T, N, H]` with zeros in the rows that see none of `num_keys` keys."""
        mask = self.mask(jnp.arange(out.shape[1]), jnp.arange(num_keys))
        return jnp.where(mask.any(axis=-1)[:, :, None, None], out, 0)
