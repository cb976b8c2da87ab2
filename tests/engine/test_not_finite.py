"""Weights that are NaN, or overflow: an error instead of an answer."""

import functools

import jax.numpy as jnp
import pytest

from jaxinfer import LLM, SamplingParams
from jaxinfer.engine.config import EngineConfig
from jaxinfer.engine.engine import Engine
from jaxinfer.errors import NonFiniteScoresError
from jaxinfer.evaluation import token_nll
from jaxinfer.models.config import DecoderConfig
from jaxinfer.models.decoder import Decoder
from jaxinfer.models.tokenizer.byte import byte_tokenizer

[Z] = byte_tokenizer().encode("z")
GREEDY = SamplingParams(temperature=0, max_tokens=12)
MATCH = r"scores for 'z' are not finite .*: its weights are damaged, or numbers overflow"


def damaged(token: int, value: float = jnp.nan) -> Decoder:
    """A model that one token spoils from where it is read."""
    model = Decoder(DecoderConfig.tiny(tie_embeddings=False), dtype=jnp.float32)
    model.embed[...] = model.embed[...].at[token].set(value)
    return model


@functools.cache
def made() -> LLM:
    return LLM(
        (damaged(Z), byte_tokenizer(eos_id=None)), block_size=16, max_num_seqs=4,
        max_model_len=128, num_gpu_blocks_override=32,
    )  # fmt: skip


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=1, top_p=0.9, logprobs=2)])
def test_generate_chat_and_stream(params):
    with pytest.raises(NonFiniteScoresError, match=MATCH):
        made().generate(["hello", "z"], params)
    with pytest.raises(NonFiniteScoresError):
        made().chat([{"role": "user", "content": "z"}], params)
    with pytest.raises(NonFiniteScoresError, match=MATCH):
        next(made().stream("z", params))
    assert not made().engine.has_work


def test_the_prompt_is_named():
    """By its beginning and its place, or by its place alone."""
    long = "z" * 100
    with pytest.raises(NonFiniteScoresError, match=f"scores for '{'z' * 60}…' are not") as raised:
        made().generate(["a", "b", long], GREEDY)
    assert raised.value.index == 2
    with pytest.raises(NonFiniteScoresError, match="scores for a prompt of tokens are") as raised:
        made().generate([[1], [Z], [2]], GREEDY)
    assert raised.value.index == 1


def engine(model: Decoder) -> Engine:
    return Engine(model, None, EngineConfig(
        max_model_len=64, num_pages=16, page_size=16, max_num_seqs=4, max_num_batched_tokens=32,
        steps_per_sync=2, dtype=jnp.float32,
    ))  # fmt: skip


def answers(made: Engine, *prompts: list[int]) -> list[tuple[list[int], str | None]]:
    names = [made.add_request(prompt, GREEDY) for prompt in prompts]
    found: dict[str, tuple[list[int], str | None]] = {name: ([], None) for name in names}
    while made.has_work:
        made.check_invariants()
        for output in made.step():
            [part] = output.outputs
            found[output.request_id] = (
                found[output.request_id][0] + part.token_ids, part.finish_reason,
            )  # fmt: skip
    assert made.pages.num_free == made.pages.num_pages
    return [found[name] for name in names]


def test_only_the_answers_that_it_spoils_end():
    """In an engine: one at its prompt, one in the middle, and the others go on."""
    sound = engine(damaged(255, 0.0))
    [(first, _), (second, _)] = answers(sound, [1, 2, 3], [9, 8])
    spoiling = next(t for t in first[2:] if t not in second)
    before = first[: first.index(spoiling) + 1]
    got = answers(engine(damaged(spoiling)), [1, 2, 3], [9, 8], [4, spoiling])
    assert got == [(before, "error"), (second, "length"), ([], "error")]


def test_perplexity():
    with pytest.raises(NonFiniteScoresError, match="scores for tokens 1 to 7 of the text are not"):
        token_nll(damaged(5), [1, 2, 3, 4, 5, 6, 7, 8], window=8, stride=4)
