"""Perplexity of a text by strided windows, in constant memory."""

import dataclasses
import functools
import math
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinfer.models.cache import PagedKVCache
from jaxinfer.models.config import DecoderConfig
from jaxinfer.models.decoder import Decoder
from jaxinfer.models.errors import ContextLengthError, NonFiniteScoresError
from jaxinfer.models.functions import forward
from jaxinfer.models.tokenizer.tokenizer import Tokenizer
from jaxinfer.progress import Progress

_PAGE = 64
_CHUNK = 2048
_LOGITS_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PerplexityResult:
    """How well a model predicts a text.

    Attributes:
        nll: Mean negative log-likelihood of a token, nats.
        num_tokens: Tokens scored: all but the first of the text (which has no context).
        num_bytes: UTF-8 bytes of the text that was scored.
        window: Longest context of a prediction, tokens.
        stride: Tokens by which the window moves.
        seconds: Wall time, compilation included.
        compute_tokens: Tokens run through the model, those of overlaps repeated.
    """

    nll: float
    num_tokens: int
    num_bytes: int
    window: int
    stride: int
    seconds: float
    compute_tokens: int

    @property
    def perplexity(self) -> float:
        """exp(nll); depends on the tokenizer, so comparable between equal tokenizers only."""
        return math.exp(self.nll)

    @property
    def bits_per_byte(self) -> float:
        """Code length of the text, comparable between all models."""
        return self.nll * self.num_tokens / (math.log(2) * self.num_bytes)

    @property
    def tokens_per_second(self) -> float:
        """Tokens run through the model per second."""
        return self.compute_tokens / self.seconds if self.seconds else 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class _Window:
    begin: int  # first token read
    first: int  # first token scored
    end: int  # one past the last token scored

    @property
    def reads(self) -> int:
        """Tokens run through the model: the last one predicts nothing."""
        return self.end - self.begin - 1


def windows(num_tokens: int, *, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Cut a text so that every token but the first is scored once, with the most context.

    Args:
        num_tokens: Tokens of the text.
        window: Most tokens of a window.
        stride: Tokens by which it moves: 1 gives every token `window - 1` tokens of context,
            `window` is fastest (tokens just behind a cut have little context).

    Yields:
        (first token read, first token scored, one past the last).

    >>> list(windows(10, window=6, stride=3))
    [(0, 1, 6), (3, 6, 9), (6, 9, 10)]
    """
    begin, scored = 0, 1
    while scored < num_tokens:
        end = min(begin + window, num_tokens)
        yield begin, max(scored, begin + 1), end
        scored = end
        # Disjoint windows share one token: the last of one is the context of the next one's first.
        begin += min(stride, window - 1)


def evaluate_perplexity(
    model: Decoder,
    tokenizer: Tokenizer,
    text: str,
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 1,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Score a text with a model.

    Args:
        model: A decoder.
        tokenizer: Its tokenizer.
        text: What to predict.
        window: Tokens of context and prediction together; default 2048, or the model's context
            if that is shorter.
        stride: Tokens by which the window moves; default half a window.
        batch_size: Windows that are computed together.
        max_tokens: Stop after so many tokens of the text.
        progress: Called with (`"evaluate"`, tokens scored, tokens in all), first with 0.

    Raises:
        ValueError: a text of fewer than two tokens, or sizes that do not fit together.
        ContextLengthError: a window longer than the model's context.
        NonFiniteScoresError: the model's scores are NaN or infinite.
    """
    check_sizes(window, stride, batch_size, max_tokens)
    ids = tokenizer.encode(text)
    cut = max_tokens is not None and max_tokens < len(ids)
    ids = ids[:max_tokens] if cut else ids
    longest = model.config.max_position_embeddings
    window = min(2048, longest) if window is None else window
    stride = max(window // 2, 1) if stride is None else stride
    start = time.perf_counter()
    nll = token_nll(
        model, ids, window=window, stride=stride, batch_size=batch_size, progress=progress
    )
    seconds = time.perf_counter() - start
    has_bos = ids[0] == tokenizer.bos_id and tokenizer.add_bos
    whole = has_bos and not cut
    scored = text if whole else tokenizer.decode(ids[1:], skip_special=False)
    return PerplexityResult(
        nll=float(np.mean(nll, dtype=np.float64)),
        num_tokens=nll.size,
        num_bytes=len(scored.encode()),
        window=window,
        stride=stride,
        seconds=seconds,
        compute_tokens=sum(
            end - begin - 1 for begin, _, end in windows(len(ids), window=window, stride=stride)
        ),
    )


def token_nll(
    model: Decoder,
    token_ids: Sequence[int] | np.ndarray,
    *,
    window: int,
    stride: int,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> np.ndarray:
    """Negative log-likelihood of every token but the first.

    Args:
        model: A decoder.
        token_ids: Tokens of the text, n of them.
        window: Most tokens of a window.
        stride: Tokens by which it moves, at most `window`.
        batch_size: Windows that are computed together.
        progress: Called with (`"evaluate"`, tokens scored, tokens in all), first with 0.

    Returns:
        `[n - 1]` float32, nats.

    Raises:
        ValueError: fewer than two tokens, a token outside the vocabulary, or sizes that do not
            fit together.
        ContextLengthError: a window longer than the model's context.
        NonFiniteScoresError: the model's scores are NaN or infinite.

    Numerics: hidden states in the model's dtype, logits and log-sum-exp in float32.

    Memory: a cache of `batch_size · window` tokens, hidden states of 2048 tokens per row, and at
    most 64 MiB of logits (16 rows where a vocabulary is larger than that).
    """
    ids = np.asarray(token_ids, np.int32)
    check_input(model.config, ids, window, stride, batch_size)
    every = [_Window(*w) for w in windows(len(ids), window=window, stride=stride)]
    length = max(w.reads for w in every)
    rows = _logit_rows(model.config.vocab_size, min(length, _CHUNK))
    chunk = min(-(-length // rows) * rows, -(-_CHUNK // rows) * rows)
    batch_size = min(batch_size, len(every))
    cache = PagedKVCache.create(
        model.config,
        batch_size=batch_size,
        max_len=-(-length // _PAGE) * _PAGE,
        page_size=_PAGE,
        dtype=model.embed[...].dtype,
        parallel=model.parallel,
    )
    result = np.zeros((len(ids) - 1,), np.float32)
    if progress is not None:
        progress("evaluate", 0, result.size)  # the first window takes long: it is compiled
    for at in range(0, len(every), batch_size):
        group = every[at : at + batch_size]
        cache = cache.replace(lengths=jnp.zeros((batch_size,), jnp.int32))
        pending = []
        for offset in range(0, max(w.reads for w in group), chunk):
            inputs, targets, counts = _chunk_of(ids, group, batch_size, offset, chunk)
            scores, cache = _score(
                model, inputs, targets, counts, cache=cache, fresh=offset == 0, rows=rows
            )
            pending.append(scores)
        scores = np.concatenate(jax.device_get(pending), axis=1)
        for row, w in enumerate(group):
            found = scores[row, w.first - 1 - w.begin : w.reads]
            if not np.isfinite(found).all():
                raise NonFiniteScoresError(f"tokens {w.first} to {w.end - 1} of the text")
            result[w.first - 1 : w.end - 1] = found
        if progress is not None:
            progress("evaluate", group[-1].end - 1, result.size)
    return result


@functools.partial(jax.jit, donate_argnames="cache", static_argnames=("fresh", "rows"))
def _score(
    model: Decoder,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    counts: Int[Array, "B"],
    *,
    cache: PagedKVCache,
    fresh: bool,
    rows: int,
) -> tuple[Float[Array, "B T"], PagedKVCache]:
    """Append tokens and score the one after each, `rows` at a time."""
    hidden, cache = forward(model, tokens, cache, counts, fresh=fresh)

    def block(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        states, wanted = pair
        scores = model.logits(states)
        found = jnp.take_along_axis(scores, wanted[:, None], axis=1)[:, 0]
        return jax.nn.logsumexp(scores, axis=-1) - found

    blocks = hidden.reshape(-1, rows, hidden.shape[-1]), targets.reshape(-1, rows)
    return jax.lax.map(block, blocks).reshape(tokens.shape), cache


def _chunk_of(
    ids: np.ndarray, group: Sequence[_Window], batch_size: int, offset: int, chunk: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Inputs, targets and how many are real, for tokens `offset …` of each window."""
    inputs = np.zeros((batch_size, chunk), np.int32)
    targets, counts = np.zeros_like(inputs), np.zeros((batch_size,), np.int32)
    for row, w in enumerate(group):
        begin = w.begin + offset
        count = min(max(w.end - 1 - begin, 0), chunk)
        counts[row] = count
        inputs[row, :count] = ids[begin : begin + count]
        targets[row, :count] = ids[begin + 1 : begin + 1 + count]
    return jnp.asarray(inputs), jnp.asarray(targets), jnp.asarray(counts)


def _logit_rows(vocab_size: int, length: int) -> int:
    """A power of two of rows whose float32 logits fit the budget, from 16 up."""
    rows = 16
    while rows < length and 2 * rows * vocab_size * 4 <= _LOGITS_BYTES:
        rows *= 2
    return rows


def check_sizes(
    window: int | None, stride: int | None, batch_size: int, max_tokens: int | None = None
) -> None:
    """Refuse what is wrong for every model; arguments as in `evaluate_perplexity`.

    Raises:
        ValueError: the message names the size.
    """
    if window is not None and window < 2:
        raise ValueError(f"window must be at least 2 tokens; got {window}")
    if stride is not None and stride < 1:
        raise ValueError(f"stride must be at least 1 token; got {stride}")
    if window is not None and stride is not None and stride > window:
        raise ValueError(f"stride must be 1 to window={window} tokens; got {stride}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive; got {batch_size}")
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(
            f"max_tokens must be at least 2 (the first is not scored); got {max_tokens}"
        )


def check_input(
    config: DecoderConfig,
    token_ids: Sequence[int] | np.ndarray,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 1,
) -> None:
    """Refuse what does not suit a model, which need not be loaded for it.

    Raises:
        ValueError, ContextLengthError: as `token_nll` does.
    """
    ids = np.asarray(token_ids, np.int32)
    if ids.size < 2:
        raise ValueError(f"perplexity needs a text of at least two tokens; got {ids.size}")
    check_sizes(window, stride, batch_size)
    if window is not None and window > (longest := config.max_position_embeddings):
        raise ContextLengthError(
            f"window must fit the model's context of {longest} tokens; got {window}"
        )
    low, high, size = int(ids.min()), int(ids.max()), config.vocab_size
    if low < 0 or high >= size:
        raise ValueError(f"token ids must be 0 to {size - 1}; got {low if low < 0 else high}")
