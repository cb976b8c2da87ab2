"""A model small enough to run in every test, and what drives an engine with it."""

import contextlib
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from jaxinfer.engine.config import EngineConfig
from jaxinfer.engine.engine import Engine
from jaxinfer.llm import LLM
from jaxinfer.models.config import DecoderConfig
from jaxinfer.models.decoder import Decoder
from jaxinfer.models.tokenizer.byte import byte_tokenizer
from jaxinfer.models.tokenizer.tokenizer import Tokenizer
from jaxinfer.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12)


@functools.cache
def decoder(num_layers: int = 1) -> Decoder:
    """Random weights, one token per byte; what layers do to each other is in `tests/models`."""
    return Decoder(DecoderConfig.tiny(num_layers=num_layers), dtype=jnp.float32)


@functools.cache
def tokenizer(eos_id: int | None = None) -> Tokenizer:
    return byte_tokenizer(eos_id=eos_id)


def engine(*, text: bool = False, eos_id: int | None = None, **sizes: object) -> Engine:
    """An engine that checks itself at every step; `sizes` replace single fields."""
    fields: dict[str, object] = {
        "max_model_len": 128, "num_pages": 32, "page_size": 16, "max_num_seqs": 4,
        "max_num_batched_tokens": 32, "steps_per_sync": 2, "dtype": jnp.float32,
    }  # fmt: skip
    made = Engine(
        decoder(),
        tokenizer(eos_id) if text else None,
        EngineConfig(**(fields | sizes)),  # type: ignore[arg-type]
    )
    made._checked = True
    return made


def llm(*, eos_id: int | None = None, **options: object) -> LLM:
    """An `LLM` of the same model."""
    fields: dict[str, object] = {
        "block_size": 16, "max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 128,
        "num_gpu_blocks_override": 32,
    }  # fmt: skip
    made = LLM((decoder(), tokenizer(eos_id)), **(fields | options))  # type: ignore[arg-type]
    made.engine._checked = True
    return made


@functools.cache
def shared_llm() -> LLM:
    """One for many tests, so that little is compiled; each must leave it idle."""
    return llm()


def assert_idle(made: LLM) -> None:
    """Fail if anything of a request is left."""
    assert not made.engine.has_work, "a request was left behind"
    assert made.engine.pages.num_free == made.engine.pages.num_pages
    assert not made._requests._tickets


def alone(prompt: str, max_tokens: int) -> list[int]:
    """What `shared_llm` says to a prompt that nobody shares the batch with."""
    [output] = shared_llm().generate(prompt, GREEDY.replace(max_tokens=max_tokens))
    return output.outputs[0].token_ids


def run(made: Engine) -> dict[str, dict[int, list[int]]]:
    """Step until nothing is left; tokens by request and answer. All pages must be free then."""
    tokens: dict[str, dict[int, list[int]]] = {}
    while made.has_work:
        for output in made.step():
            answers = tokens.setdefault(output.request_id, {})
            for part in output.outputs:
                answers.setdefault(part.index, []).extend(part.token_ids)
    made.check_invariants()
    assert made.pages.num_free == made.pages.num_pages
    return tokens


def generate(
    made: Engine, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
) -> list[list[int]]:
    """First answers of prompts that are computed together."""
    names = [made.add_request(p, s) for p, s in zip(prompts, params, strict=True)]
    tokens = run(made)
    return [tokens[name][0] for name in names]


def prompts(count: int, *, longest: int = 24) -> list[list[int]]:
    """Different prompts of different lengths."""
    return [[(7 * i + 3 * j) % 250 + 1 for j in range(1 + (5 * i) % longest)] for i in range(count)]


_compiled = 0


def _on_duration(event: str, duration_secs: float, **_: str | int) -> None:
    global _compiled
    del duration_secs
    _compiled += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_on_duration)


@contextlib.contextmanager
def compilations() -> Iterator[list[int]]:
    """Count what XLA compiles inside; the number is appended at the end."""
    before, count = _compiled, []
    yield count
    count.append(_compiled - before)
