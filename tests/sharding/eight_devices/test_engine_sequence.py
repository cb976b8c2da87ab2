"""The engine answers as on one device where the mesh axis `seq` shares the tokens."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxinfer.engine import sizing
from jaxinfer.engine.engine import Engine
from jaxinfer.errors import KVCacheFullError
from jaxinfer.evaluation import token_nll
from jaxinfer.llm import LLM
from jaxinfer.models.config import DecoderConfig
from jaxinfer.models.decoder import Decoder
from jaxinfer.outputs import RequestOutput
from jaxinfer.sampling_params import SamplingParams
from tests.engine.small import compilations
from tests.models import real
from tests.models.families import weights_of
from tests.paths import model_path, needs_model

# One layer: what layers do to each other is in `test_models.py`.
NINE = DecoderConfig.tiny(
    vocab_size=97, num_layers=1, num_heads=9, num_kv_heads=3, intermediate_size=80,
    tie_embeddings=True,
)  # fmt: skip
GREEDY = SamplingParams(temperature=0, max_tokens=40)
# Shorter than every axis, odd, longer than a page, longer than several chunks.
LENGTHS = (1, 2, 3, 7, 31, 77, 64, 5)


@functools.cache
def decoder() -> Decoder:
    """On one device."""
    return Decoder.from_weights(NINE, weights_of(NINE).__getitem__, dtype=jnp.float32)


def questions() -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, NINE.vocab_size, length).tolist() for length in LENGTHS]


def llm(mesh: str | None, **options: Any) -> LLM:
    sizes: dict[str, Any] = {
        "max_num_seqs": 2, "max_num_batched_tokens": 32, "max_model_len": 128,
        "num_gpu_blocks_override": 32, "block_size": 16,
    }  # fmt: skip
    made = LLM((decoder(), None), mesh=mesh, **(sizes | options))
    for engine in made.engines:
        engine._checked = True
    return made


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


@functools.cache
def expected() -> list[list[int]]:
    """One after another, whole prompts, a page for each: few programs."""
    one = llm(None, max_num_seqs=1, max_num_batched_tokens=128, num_gpu_blocks_override=1,
              block_size=128)  # fmt: skip
    return tokens(one.generate(questions(), GREEDY))


@pytest.mark.parametrize(
    ("mesh", "pages", "preempts"), [("seq=4", 3, False), ("seq=2,tensor=2", 4, True)]
)
def test_greedy_answers_are_those_of_one_device(mesh, pages, preempts):
    """Prompts in several chunks, more requests than rows, pages that run out.

    Everybody keeps room for one more page, so that only answers of several pages are preempted.
    """
    made = llm(mesh, num_gpu_blocks_override=pages)
    assert tokens(made.generate(questions(), GREEDY)) == expected()
    known = made.engine.runner.programs
    with compilations() as compiled:  # what comes back from a step goes in from there
        made.generate(questions(), GREEDY)
    assert made.engine.runner.programs == known
    assert compiled == [0]
    engine = made.engine
    assert isinstance(engine, Engine)
    assert engine.config.page_size == 16 * int(mesh[4])
    assert (engine.metrics.preemptions > 0) == preempts
    assert engine.pages.num_free == pages


def test_sampled_answers_and_log_probabilities():
    params = [
        SamplingParams(temperature=1.0, seed=3, top_p=0.9, max_tokens=12, logprobs=2),
        SamplingParams(temperature=0, repetition_penalty=1.3, max_tokens=9, prompt_logprobs=2),
        SamplingParams(temperature=0.7, top_k=20, max_tokens=12, logprobs=2),
    ]
    asked = [questions()[i] for i in (3, 5, 7)]
    want, got = (llm(mesh).generate(asked, params) for mesh in (None, "seq=3"))
    assert tokens(got) == tokens(want)
    mine, theirs = (output[1].prompt_logprobs or [] for output in (got, want))
    assert len(mine) == len(theirs) == 77
    for a, b in zip(mine[1:], theirs[1:], strict=True):
        assert a is not None
        assert b is not None
        for token, entry in a.items():
            assert entry.logprob == pytest.approx(b[token].logprob, abs=1e-4)


def test_a_device_has_its_share_of_the_cache_and_all_weights():
    made = llm("seq=4", num_gpu_blocks_override=5)
    pages = made.engine.runner._pages[0][0]
    assert pages.shape == (5, 3, 64, NINE.head_dim)
    assert isinstance(pages.sharding, NamedSharding)
    assert {s.data.shape for s in pages.addressable_shards} == {(5, 3, 16, NINE.head_dim)}
    assert {s.device for s in pages.addressable_shards} == set(jax.devices()[:4])
    weights = jax.tree.leaves(made.engine.runner._weights)
    assert all(array.sharding.is_fully_replicated for array in weights)


def test_a_cache_of_the_same_memory_holds_n_times_as_much(monkeypatch):
    page = sizing._page_bytes(NINE, 16, jnp.float32)
    monkeypatch.setattr(sizing, "_CPU_CACHE_BYTES", 24 * page)
    made = LLM((decoder(), None), mesh="seq=4", block_size=16)
    sizes = made.engine.config
    assert (sizes.num_pages, sizes.page_size) == (6, 64)  # devices of a CPU share its memory
    assert sizes.max_model_len == min(6 * 64, NINE.max_position_embeddings)
    assert sizes.max_num_batched_tokens == 4 * 512
    monkeypatch.setattr(sizing, "_CPU_CACHE_BYTES", 3 * page)
    with pytest.raises(KVCacheFullError):
        LLM((decoder(), None), mesh="seq=4", block_size=16)


def test_perplexity():
    ids = np.random.default_rng(2).integers(0, 97, 40)
    want = token_nll(decoder(), ids, window=23, stride=12)
    got = token_nll(decoder().divide("seq=4"), ids, window=23, stride=12)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


SIZES: Any = {
    "max_model_len": 64, "num_gpu_blocks_override": 8, "max_num_seqs": 1, "block_size": 16,
    "max_num_batched_tokens": 12,
}  # fmt: skip


@pytest.mark.model
@needs_model("smollm2")
def test_a_real_model():
    """SmolLM2, 9 query and 3 KV heads, from its file; nothing divides heads or prompts.

    What an independent implementation said: of its excerpt, how a short prompt goes on, and the
    token after the first 11. By the axis `tensor` alone the model is in `test_processes.py`.
    """
    want = real.excerpt()
    asked = [want["prompt_ids"].tolist(), want["ids"][:11].tolist()]
    assert [len(prompt) for prompt in asked] == [5, 11]
    said = want["gen_ids"][5:17].tolist()
    params = [GREEDY.replace(max_tokens=count) for count in (len(said), 1)]
    made = LLM(str(model_path("smollm2")), mesh="seq=2,tensor=2", dtype="float32", **SIZES)
    assert tokens(made.generate(asked, params)) == [said, [want["top_ids"][10, 0]]]
