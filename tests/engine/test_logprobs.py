"""Log-probabilities against a dense computation in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.engine.logprobs import CHUNK, prompt_logprobs, step_logprobs, to_dict
from jaxinfer.llm import LLM
from jaxinfer.models.cache import PagedKVCache
from jaxinfer.models.functions import forward
from jaxinfer.sampling_params import SamplingParams
from tests.engine.small import decoder, engine, llm, tokenizer


def log_softmax(scores) -> np.ndarray:
    scores = np.asarray(scores, np.float64)
    top = scores.max(-1, keepdims=True)
    return scores - top - np.log(np.exp(scores - top).sum(-1, keepdims=True))


def dense(tokens: list[int]) -> np.ndarray:
    """`[T, V]` after every token, the whole sequence at once."""
    cache = PagedKVCache.create(
        decoder().config, batch_size=1, max_len=128, page_size=16, dtype=jnp.float32
    )
    hidden, _ = forward(decoder(), jnp.asarray([tokens], jnp.int32), cache, fresh=True)
    return log_softmax(decoder().logits(hidden[0]))


def assert_entry(entry, token: int, want: np.ndarray, count: int) -> None:
    """An entry holds the token and the `count` best, with value, rank and text."""
    order = np.argsort(-want, kind="stable")
    assert set(entry) == {token, *order[:count].tolist()}
    for key, found in entry.items():
        assert found.logprob == pytest.approx(want[key], abs=2e-4)
        assert found.rank == int(np.flatnonzero(order == key)[0]) + 1


def test_one_step():
    scores = np.random.default_rng(0).normal(0, 3, (5, 40)).astype(np.float32)
    tokens = np.array([3, 39, 0, 7, 7], np.int32)
    report = jax.device_get(step_logprobs(jnp.asarray(scores), jnp.asarray(tokens), 5))
    want = log_softmax(scores)
    for i, token in enumerate(tokens.tolist()):
        entry = to_dict(report, (i,), token, 5, None)
        assert_entry(entry, token, want[i], 5)
        assert entry[token].decoded_token is None
        assert set(to_dict(report, (i,), token, 0, str)) == {token}
        assert to_dict(report, (i,), token, 0, str)[token].decoded_token == str(token)


@pytest.mark.parametrize(("batch", "length"), [(1, 7), (2, CHUNK // 2), (3, 100)])
def test_positions_in_chunks(batch, length):
    """Fewer positions than a chunk, exactly one, and one and a half."""
    rng = np.random.default_rng(1)
    hidden = rng.normal(size=(batch, length, 64)).astype(np.float32)
    targets = rng.integers(0, 256, (batch, length)).astype(np.int32)
    report = prompt_logprobs(decoder(), jnp.asarray(hidden), jnp.asarray(targets), 3)
    want = log_softmax(decoder().logits(jnp.asarray(hidden)))
    assert report.top.shape == (batch, length, 3)
    picked = np.take_along_axis(want, targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(report.chosen, picked, atol=2e-5)
    np.testing.assert_array_equal(report.rank, 1 + (want > picked[..., None]).sum(-1))
    np.testing.assert_allclose(report.top, -np.sort(-want)[..., :3], atol=2e-5)


@functools.cache
def shared() -> LLM:
    """One for all tests, so that little is compiled."""
    return llm(max_num_batched_tokens=64)


@pytest.mark.parametrize("count", [1, 7])
def test_of_an_answer(count):
    """Before temperature and penalties: those of the model itself."""
    prompt = list(range(30, 47))
    params = SamplingParams(temperature=0.7, seed=2, logprobs=count, max_tokens=9,
                            repetition_penalty=1.5)  # fmt: skip
    [output] = shared().generate([prompt], params)
    answer = output.outputs[0]
    want = dense([*prompt, *answer.token_ids])
    assert answer.logprobs is not None
    assert len(answer.logprobs) == len(answer.token_ids) == 9
    total = 0.0
    for i, (entry, token) in enumerate(zip(answer.logprobs, answer.token_ids, strict=True)):
        assert_entry(entry, token, want[len(prompt) - 1 + i], count)
        total += entry[token].logprob
    assert answer.cumulative_logprob == pytest.approx(total, abs=1e-6)
    assert output.prompt_logprobs is None


@pytest.mark.parametrize("chunk", [16, 64])
def test_of_a_prompt(chunk):
    """Also where the prompt is computed in several chunks; the first token has none."""
    prompt = [(11 * i) % 250 for i in range(41)]
    words = tokenizer()
    made = shared() if chunk == 64 else llm(max_num_batched_tokens=chunk)
    [output] = made.generate(
        [prompt], SamplingParams(temperature=0, prompt_logprobs=2, max_tokens=2)
    )
    want = dense(prompt)
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(prompt)
    assert output.prompt_logprobs[0] is None
    for i, entry in enumerate(output.prompt_logprobs[1:]):
        assert entry is not None
        assert_entry(entry, prompt[i + 1], want[i], 2)
        assert entry[prompt[i + 1]].decoded_token == words.token(prompt[i + 1])
    assert output.outputs[0].logprobs is None
    assert output.outputs[0].cumulative_logprob is None


def test_they_change_no_token():
    plain = SamplingParams(temperature=1.0, seed=3, max_tokens=9)
    asked = plain.replace(logprobs=5, prompt_logprobs=1)
    outputs = shared().generate([[1, 2, 3]] * 2, [plain, asked])
    assert outputs[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids


def test_compilations_are_counted():
    """A report of another size is another program; the same again is none."""
    made = engine()
    counts = []
    for count in (None, None, 5, 4):
        made.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=3, logprobs=count))
        while made.has_work:
            made.step()
        counts.append(made.metrics.compilations_total)
    assert counts == [2, 2, 4, 4]  # a prefill and a step each
    assert made.metrics.compilations_total == made.runner.programs
