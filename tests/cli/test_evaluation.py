"""Perplexity by strided windows."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.evaluation import evaluate_perplexity, token_nll, windows
from jaxinfer.models.cache import PagedKVCache
from jaxinfer.models.checkpoint.open import load_model, open_checkpoint
from jaxinfer.models.config import DecoderConfig
from jaxinfer.models.decoder import Decoder
from jaxinfer.models.errors import ContextLengthError
from jaxinfer.models.functions import forward
from jaxinfer.models.tokenizer.byte import byte_tokenizer
from tests.paths import golden, model_path, needs_golden, needs_model


@pytest.fixture(scope="module")
def model():
    return Decoder(DecoderConfig.tiny(), dtype=jnp.float32)


_forward = jax.jit(forward, static_argnames="fresh")


def whole_nll(model, ids):
    """The same in one piece: all logits of one sequence."""
    cache = PagedKVCache.create(model.config, batch_size=1, max_len=512, dtype=jnp.float32)
    hidden, _ = _forward(model, jnp.asarray(ids)[None], cache, fresh=True)
    scores = np.asarray(model.logits(hidden[0]), np.float64)[:-1]
    top = scores.max(axis=-1)
    total = top + np.log(np.exp(scores - top[:, None]).sum(axis=-1))
    return total - scores[np.arange(len(scores)), ids[1:]]


@pytest.mark.parametrize(
    ("n", "window", "stride"),
    [(2, 8, 8), (63, 16, 8), (64, 16, 16), (65, 16, 1), (100, 101, 50), (9, 2, 2)],
)
def test_every_token_is_scored_once_in_order(n, window, stride):
    scored = []
    for begin, first, end in windows(n, window=window, stride=stride):
        assert begin < first < end <= begin + window
        scored += range(first, end)
    assert scored == list(range(1, n))


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("window", "stride"), [(200, 200), (64, 32), (50, 17), (33, 33)])
def test_equals_each_window_alone(model, window, stride, batch_size):
    ids = np.random.default_rng(0).integers(0, 256, 150)
    got = token_nll(model, ids, window=window, stride=stride, batch_size=batch_size)
    want = np.zeros(149)
    for begin, first, end in windows(150, window=window, stride=stride):
        want[first - 1 : end - 1] = whole_nll(model, ids[begin:end])[first - 1 - begin :]
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_long_windows_are_read_in_chunks(model, monkeypatch):
    """Chunks after the first read the pages that earlier ones wrote."""
    monkeypatch.setattr("jaxinfer.evaluation._CHUNK", 32)
    ids = np.random.default_rng(1).integers(0, 256, 150)
    got = token_nll(model, ids, window=150, stride=150)
    np.testing.assert_allclose(got, whole_nll(model, ids), atol=2e-5)


def test_result_in_all_units(model):
    text = "The quick brown fox jumps over the lazy dog, naïvely. " * 3
    result = evaluate_perplexity(model, byte_tokenizer(), text, window=64, stride=32)
    size = len(text.encode())
    # No token begins the text, so its first byte has no context.
    assert (result.num_tokens, result.num_bytes) == (size - 1, size - 1)
    assert result.perplexity == pytest.approx(math.exp(result.nll))
    assert result.bits_per_byte == pytest.approx(result.nll / math.log(2))
    cut = evaluate_perplexity(model, byte_tokenizer(), text, window=64, stride=32, max_tokens=40)
    assert (cut.num_tokens, cut.num_bytes) == (39, 39)


def test_progress_begins_with_the_total_and_ends_at_the_end(model):
    seen = []
    token_nll(model, np.arange(100), window=32, stride=16, progress=lambda *s: seen.append(s))
    assert (seen[0], seen[-1]) == (("evaluate", 0, 99), ("evaluate", 99, 99))
    assert [done for _, done, _ in seen] == sorted({done for _, done, _ in seen})


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([], {}, "at least two tokens; got 0"),
        ([1], {}, "at least two tokens; got 1"),
        ([1, 256], {}, "token ids must be 0 to 255; got 256"),
        ([1, -1], {}, "token ids must be 0 to 255; got -1"),
        ([1, 2], {"window": 1}, "window must be at least 2"),
        ([1, 2], {"stride": 9}, "stride must be 1 to window=8"),
        ([1, 2], {"stride": 0}, "stride must be at least 1"),
        ([1, 2], {"batch_size": 0}, "batch_size must be positive"),
    ],
)
def test_bad_arguments(model, ids, options, message):
    with pytest.raises(ValueError, match=message):
        token_nll(model, ids, **({"window": 8, "stride": 8} | options))


def test_a_text_that_is_cut_too_short(model):
    with pytest.raises(ValueError, match=r"max_tokens must be at least 2 .*; got 1"):
        evaluate_perplexity(model, byte_tokenizer(), "abc", max_tokens=1)


def test_window_longer_than_the_context(model):
    with pytest.raises(ContextLengthError, match="512 tokens; got 513"):
        token_nll(model, [1, 2], window=513, stride=1)


@pytest.mark.model
@needs_model("smollm2")
@needs_golden("smollm2")
def test_golden_nll():
    path, want = model_path("smollm2"), golden("smollm2", "_jargon")
    assert path is not None
    assert want is not None
    model = load_model(open_checkpoint(path), dtype=jnp.float32)
    got = token_nll(model, want["ids"], window=1024, stride=1024)
    assert np.abs(got - want["nll"]).max() < 5e-4
    assert got.mean() == pytest.approx(want["nll"].mean(), abs=2e-5)
