"""Real models against what an independent implementation computes.

float32: logits within 1e-3, NLL of every token within 5e-4 (seen: 2.1e-4 and 1.6e-4).

bfloat16: each rounding to 8 bits has a relative rms of 0.0011, and the residual stream is rounded
twice in each of 18 to 30 layers: sqrt(60) · 0.0011 is 0.9 % of logits whose spread is 3 to 6, and
matrices, rounded as well, add as much. Seen: rms of the logits 0.17 / 0.08 / 0.05, largest 0.93,
mean NLL off by 0.0018 / 0.0001 / 0.0003 (SmolLM2, Gemma 3, Qwen2.5).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.models.cache import PagedKVCache
from jaxinfer.models.functions import decode_step, prefill
from tests.models.real import NAMES, checkpoint, decoder, excerpt, score, tokenizer
from tests.paths import golden, needs_golden, needs_model

LOGITS, NLL = 1e-3, 5e-4
BF16_LOGITS_RMS, BF16_LOGITS, BF16_MEAN_NLL = 0.25, 1.5, 5e-3

each_model = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[needs_model(n), needs_golden(n)]) for n in NAMES]
)


def read(name: str, suffix: str = "") -> dict[str, np.ndarray]:
    """Golden arrays without their batch axis of one."""
    arrays = golden(name, suffix)
    assert arrays is not None
    return {key: a[0] if a.ndim > 1 and a.shape[0] == 1 else a for key, a in arrays.items()}


def largest(got: np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    return float(np.abs(got.astype(np.float64) - want).max())


def assert_greedy(name: str, ids: list[int], prompt: int) -> None:
    """Prefill a prompt, feed the golden continuation token by token through `decode_step`.

    Each golden token must be the best, or so near to it that rounding decides.
    """
    model = decoder(name, "float32")
    start = jax.jit(prefill, donate_argnames="cache", static_argnames="fresh")
    step = jax.jit(decode_step, donate_argnames="cache")
    cache = PagedKVCache.create(model.config, batch_size=1, max_len=64, dtype=jnp.float32)
    scores, cache = start(model, jnp.asarray([ids[:prompt]], jnp.int32), cache=cache, fresh=True)
    for token in ids[prompt:]:
        row = np.asarray(scores)[0]
        assert row[token] >= row.max() - 2 * LOGITS, (token, int(row.argmax()))
        scores, cache = step(model, jnp.asarray([token], jnp.int32), cache=cache)


@each_model
def test_logits_of_the_prompt(name):
    want = read(name)
    ids = want["prompt_ids"]
    every = np.broadcast_to(
        np.arange(want["prompt_logits"].shape[-1], dtype=np.int32), want["prompt_logits"].shape
    )
    _, got, best = score(decoder(name, "float32"), ids, every)
    assert largest(got, want["prompt_logits"]) < LOGITS
    np.testing.assert_array_equal(best, want["prompt_logits"].argmax(-1))


@each_model
@pytest.mark.parametrize("chunk", [None, 200])
def test_nll_and_top_logits_of_the_jargon_file(name, chunk):
    want = read(name, "_jargon")
    nll, top, _ = score(decoder(name, "float32"), want["ids"], want["top_ids"], chunk=chunk)
    assert largest(nll, want["nll"]) < NLL
    assert largest(top, want["top_logits"]) < LOGITS


@each_model
def test_nll_of_the_essay(name):
    want = read(name)
    ids = want["text_ids"]
    every = np.broadcast_to(
        np.arange(len(want["last_logits"]), dtype=np.int32), (1, len(want["last_logits"]))
    )
    wanted = np.zeros((len(ids), 1), np.int32)
    nll, _, _ = score(decoder(name, "float32"), ids, wanted)
    assert largest(nll, want["text_nll"]) < NLL
    model = decoder(name, "float32")
    cache = PagedKVCache.create(model.config, batch_size=1, max_len=2048, dtype=jnp.float32)
    scores, _ = jax.jit(prefill)(model, jnp.asarray(ids[None], jnp.int32), cache)
    assert largest(np.asarray(scores), want["last_logits"][every[:, : len(every[0])]]) < LOGITS


@each_model
def test_greedy_continuation(name):
    want = read(name)
    assert_greedy(name, want["gen_ids"].tolist(), len(want["prompt_ids"]))


@each_model
def test_bfloat16(name):
    want = read(name, "_jargon")
    nll, top, _ = score(decoder(name, "bfloat16"), want["ids"], want["top_ids"])
    error = np.sqrt(np.mean((top - want["top_logits"]) ** 2))
    assert error < BF16_LOGITS_RMS
    assert largest(top, want["top_logits"]) < BF16_LOGITS
    assert abs(nll.mean() - want["nll"].mean()) < BF16_MEAN_NLL


@each_model
def test_tokens_of_the_text(name):
    """The tokenizer in the file cuts both texts as the model's own does."""
    for suffix, key in (("", "prompt_ids"), ("", "text_ids"), ("_jargon", "ids")):
        ids = read(name, suffix)[key].tolist()
        assert tokenizer(name).encode(tokenizer(name).decode(ids)) == ids


def test_excerpt_is_small():
    assert sum(a.nbytes for a in excerpt().values()) < 100_000


@needs_model("smollm2")
class TestExcerpt:
    """The committed part: SmolLM2 from a clone alone."""

    def test_tokens(self):
        words, want = tokenizer("smollm2"), excerpt()
        assert words.encode("The capital of France is") == want["prompt_ids"].tolist()
        assert words.encode(words.decode(want["ids"])) == want["ids"].tolist()

    def test_prompt_logits(self):
        want = excerpt()
        model = decoder("smollm2", "float32")
        _, got, _ = score(model, want["prompt_ids"], want["prompt_logit_ids"])
        assert largest(got, want["prompt_logits"]) < LOGITS

    @pytest.mark.parametrize("chunk", [None, 100])
    def test_nll_and_top_logits(self, chunk):
        want = excerpt()
        model = decoder("smollm2", "float32")
        nll, top, best = score(model, want["ids"], want["top_ids"], chunk=chunk)
        assert largest(nll, want["nll"]) < NLL
        assert largest(top, want["top_logits"]) < LOGITS
        clear = want["top_logits"][:, 0] - want["top_logits"][:, 1] > 2 * LOGITS
        np.testing.assert_array_equal(best[clear], want["top_ids"][clear, 0])

    def test_greedy_continuation(self):
        want = excerpt()
        assert_greedy("smollm2", want["gen_ids"].tolist(), len(want["prompt_ids"]))

    def test_bfloat16(self):
        want = excerpt()
        model = decoder("smollm2", "bfloat16")
        nll, top, _ = score(model, want["ids"], want["top_ids"])
        assert np.sqrt(np.mean((top - want["top_logits"]) ** 2)) < BF16_LOGITS_RMS
        assert largest(top, want["top_logits"]) < BF16_LOGITS
        assert abs(nll.mean() - want["nll"].mean()) < BF16_MEAN_NLL

    def test_shape_of_the_model(self):
        opened = checkpoint("smollm2")
        config = opened.config
        assert (config.family, config.num_layers, config.hidden_size) == ("llama", 30, 576)
        assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
        assert config.rope_theta == 1e5
        assert config.tie_embeddings
        assert opened.generation.eos_token_ids == (2,)


@needs_model("gemma3")
def test_shape_of_gemma3():
    config = checkpoint("gemma3").config
    assert [i for i, local in enumerate(config.local_layers) if not local] == [5, 11, 17]
    assert (config.head_dim, config.sliding_window, config.qk_norm) == (256, 512, True)
    assert (config.rope_theta, config.local_rope_theta) == (1e6, 1e4)


@needs_model("qwen25")
def test_shape_of_qwen25():
    config = checkpoint("qwen25").config
    assert (config.qkv_bias, config.tie_embeddings, config.rope_theta) == (True, False, 1e6)
