"""Pure functions of a decoder, to be called and jitted by anyone.

Donate the cache (`donate_argnames="cache"`): it is updated in place. Ten lines that generate:

>>> import jax, jax.numpy as jnp
>>> from jaxinfer.models.config import DecoderConfig
>>> from jaxinfer.models.cache import PagedKVCache
>>> from jaxinfer.models.decoder import Decoder
>>> model = Decoder(DecoderConfig.tiny(), dtype=jnp.float32)
>>> cache = PagedKVCache.create(model.config, batch_size=1, max_len=64, dtype=jnp.float32)
>>> start = jax.jit(prefill, donate_argnames="cache", static_argnames="fresh")
>>> step = jax.jit(decode_step, donate_argnames="cache")
>>> scores, cache = start(model, jnp.array([[1, 2, 3]]), cache=cache, fresh=True)
>>> for _ in range(3):
...     scores, cache = step(model, jnp.argmax(scores, axis=-1), cache=cache)
>>> cache.lengths.tolist()
[6]
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxinfer.models.arguments import check_active, check_call
from jaxinfer.models.cache import PagedKVCache
from jaxinfer.models.decoder import Decoder
from jaxinfer.models.errors import ContextLengthError


def forward(
    model: Decoder,
    tokens: Int[Array, "B T"],
    cache: PagedKVCache,
    num_tokens: Int[Array, "B"] | None = None,
    *,
    fresh: bool = False,
) -> tuple[Float[Array, "B T D"], PagedKVCache]:
    """Append tokens and return the hidden state of each.

    Args:
        model: The decoder.
        tokens: `[B, T]` int32, padded on the right.
        cache: Earlier tokens of each row. A row must have room (see `check_capacity`).
        num_tokens: `[B]` int32 real tokens per row; None: all T.
        fresh: Promise that all rows are empty, which saves reading pages. Static: recompiles.

    Returns:
        `[B, T, D]` normalised hidden states (undefined past `num_tokens`), and the cache.

    Raises:
        TypeError: tokens that are not integers, or a model or cache that is none.
        ValueError: shapes that do not fit, or another model's cache.
        ContextLengthError: without `num_tokens`, more than a row of the cache holds.
    """
    check_call(model, tokens, cache, num_tokens, ndim=2)
    if num_tokens is None:
        num_tokens = jnp.full((tokens.shape[0],), tokens.shape[1], jnp.int32)
    return model(tokens.astype(jnp.int32), cache, num_tokens.astype(jnp.int32), fresh=fresh)


def prefill(
    model: Decoder,
    tokens: Int[Array, "B T"],
    cache: PagedKVCache,
    num_tokens: Int[Array, "B"] | None = None,
    *,
    fresh: bool = False,
) -> tuple[Float[Array, "B V"], PagedKVCache]:
    """Append a prompt, or the next chunk of one, and score what follows its last token.

    Args: as in `forward`.

    Returns:
        `[B, V]` float32 logits (of token 0 where a row has none), and the cache.

    Raises: as `forward`.
    """
    hidden, cache = forward(model, tokens, cache, num_tokens, fresh=fresh)
    if num_tokens is None:
        last = hidden[:, -1]
    else:
        index = jnp.maximum(num_tokens - 1, 0)[:, None, None]
        last = jnp.take_along_axis(hidden, index, axis=1)[:, 0]
    return model.logits(last), cache


def decode_step(
    model: Decoder,
    tokens: Int[Array, "B"],
    cache: PagedKVCache,
    active: Bool[Array, "B"] | None = None,
) -> tuple[Float[Array, "B V"], PagedKVCache]:
    """Append one token to every row and score the next.

    Args:
        model: The decoder.
        tokens: `[B]` int32.
        cache: Earlier tokens of each row.
        active: `[B]` rows that take part; others are neither written nor advanced.

    Returns:
        `[B, V]` float32 logits (undefined for inactive rows), and the cache.

    Raises: as `forward`.
    """
    check_call(model, tokens, cache, None, ndim=1)
    check_active(active, cache)
    count = None if active is None else active.astype(jnp.int32)
    hidden, cache = forward(model, tokens[:, None], cache, count)
    return model.logits(hidden[:, 0]), cache


def logits(model: Decoder, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Scores of the next token for hidden states from `forward`, float32."""
    return model.logits(hidden)


def check_capacity(cache: PagedKVCache, num_tokens: int) -> None:
    """Raise if a row cannot take `num_tokens` more tokens; outside of `jax.jit`.

    Inside a compiled function nothing can be raised: tokens past a row's pages are written nowhere.

    Raises:
        ContextLengthError: a row would exceed `cache.max_len`.
    """
    longest = int(jax.device_get(cache.lengths).max())
    if longest + num_tokens > cache.max_len:
        raise ContextLengthError(
            f"a row holds {longest} tokens and cannot take {num_tokens} more: "
            f"its pages end at {cache.max_len}"
        )
