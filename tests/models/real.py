"""Real models, loaded once in a test run, and the sums that golden values are compared with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.models.cache import PagedKVCache
from jaxinfer.models.checkpoint.base import Checkpoint
from jaxinfer.models.checkpoint.open import load_model, open_checkpoint
from jaxinfer.models.decoder import Decoder
from jaxinfer.models.functions import forward
from jaxinfer.models.tokenizer.tokenizer import Tokenizer
from tests.paths import REPOSITORY, model_path

NAMES = ("smollm2", "gemma3", "qwen25")
EXCERPT = REPOSITORY / "tests" / "data" / "smollm2_excerpt.npz"
_FORWARD = jax.jit(forward, static_argnames="fresh", donate_argnames="cache")
# Rows of logits that are alive together: 256 × 262,144 × 4 bytes are 268 MB.
_ROWS = 256


@functools.cache
def checkpoint(name: str) -> Checkpoint:
    """The opened file; tests that call this are marked with `needs_model`."""
    path = model_path(name)
    assert path is not None
    return open_checkpoint(path)


@functools.cache
def tokenizer(name: str) -> Tokenizer:
    return checkpoint(name).tokenizer()


@functools.lru_cache(maxsize=1)
def decoder(name: str, dtype: str) -> Decoder:
    """The weights; one model at a time, 2.5 GB at most."""
    return load_model(checkpoint(name), dtype=jnp.dtype(dtype))


@functools.cache
def excerpt() -> dict[str, np.ndarray]:
    """The committed golden values of SmolLM2."""
    with np.load(EXCERPT) as arrays:
        return dict(arrays)


@jax.jit
def _rows(model: Decoder, hidden: jax.Array, targets: jax.Array, wanted: jax.Array):
    scores = model.logits(hidden)
    likelihood = jnp.take_along_axis(scores, targets[:, None], axis=1)[:, 0]
    nll = jax.nn.logsumexp(scores, axis=-1) - likelihood
    return nll, jnp.take_along_axis(scores, wanted, axis=1), jnp.argmax(scores, axis=-1)


def score(
    model: Decoder, ids: np.ndarray, wanted: np.ndarray | None = None, *, chunk: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Score a text.

    Args:
        model: The decoder.
        ids: `[T]` tokens.
        wanted: `[T, n]` tokens whose logits to return; None: no token but 0.
        chunk: Tokens per prefill, through pages; None: all at once.

    Returns:
        nll `[T-1]`, logits `[T, n]`, argmax `[T]`.
    """
    T = len(ids)
    tokens = jnp.asarray(ids, jnp.int32)[None]
    cache = PagedKVCache.create(model.config, batch_size=1, max_len=T, dtype=model.embed[...].dtype)
    if chunk is None:
        hidden, _ = _FORWARD(model, tokens, cache=cache, fresh=True)
    else:
        parts = []
        for start in range(0, T, chunk):
            part, cache = _FORWARD(model, tokens[:, start : start + chunk], cache=cache)
            parts.append(part)
        hidden = jnp.concatenate(parts, axis=1)
    wanted = np.zeros((T, 1), np.int32) if wanted is None else wanted
    targets = np.append(np.asarray(ids, np.int32)[1:], 0)
    pieces = [
        _rows(model, hidden[0, i : i + _ROWS], targets[i : i + _ROWS], wanted[i : i + _ROWS])
        for i in range(0, T, _ROWS)
    ]
    nll, scores, best = (
        np.concatenate(list(map(np.asarray, p))) for p in zip(*pieces, strict=True)
    )
    return nll[:-1], scores, best
