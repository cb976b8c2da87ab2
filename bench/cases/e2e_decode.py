"""Decode of a whole model: wall-clock time per token, everything included."""

import dataclasses
import time

import jax
import jax.numpy as jnp

from bench import plain_jax, torch_peer
from bench.case import Measurement
from bench.whole_model import (
    ABLATIONS,
    MODELS,
    RUNNERS,
    SINGLE_STEPS,
    dtype,
    engine_of,
    kv_bytes,
    measurement,
    model_of,
    plain_of,
    prompts,
    ragged_lengths,
    run_engine,
    tokens_ahead,
    weight_bytes,
)

_NEW_TOKENS = 129  # the first comes from the prefill
_WARM = 16
_OTHERS = ("dispatch-joined-rope", "dispatch-separate-rope", SINGLE_STEPS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeCase:
    """B requests of about S tokens, answered together.

    Attributes:
        model: Whose shape.
        B: Requests.
        S: Context at the middle of the answer, tokens; of the longest request.
        ragged: The others are shorter (`ragged_lengths`). Plain JAX pads them to the longest.
        rows: Rows of the engine; B of several cases share one engine.
        others: Further implementations.
        tag: As in `Case`.
    """

    model: str
    B: int
    S: int
    ragged: bool = False
    rows: int = 64
    others: tuple[str, ...] = ()
    tag: str = "primary"

    @property
    def name(self) -> str:
        """As in `Case`."""
        return f"{self.model} b{self.B} s{self.S}" + " ragged" * self.ragged

    @property
    def flops(self) -> float:
        """Products with the weights, and attention."""
        config = MODELS[self.model]()
        attention = 4 * config.num_layers * config.num_heads * config.head_dim * self._context
        weights = weight_bytes(config) / dtype().itemsize
        return 2 * self.B * weights + attention

    @property
    def bytes(self) -> float:
        """Weights once, and the keys and values of every request."""
        config = MODELS[self.model]()
        return weight_bytes(config) + kv_bytes(config, self._context)

    @property
    def implementations(self) -> tuple[str, ...]:
        """The engine with the chooser and with XLA only, and plain JAX."""
        return (*RUNNERS, *self.others)

    def measure(self, implementation: str, *, repeats: int) -> Measurement:
        """Time answers of 128 tokens; see `Case.measure`."""
        once = self._engine
        if implementation.startswith("plain_"):
            once = self._plain
        elif implementation in torch_peer.RUNNERS:
            once = self._torch
        runs = max(2, repeats // 7)
        return measurement(self.model, implementation, once, runs=runs, tokens=self.B)

    @property
    def _prompt(self) -> int:
        """Tokens of the longest prompt."""
        return self.S - _NEW_TOKENS // 2

    @property
    def _lengths(self) -> list[int]:
        """Tokens of every prompt."""
        return ragged_lengths(self.B, self._prompt) if self.ragged else [self._prompt] * self.B

    @property
    def _context(self) -> int:
        """Tokens of all requests at the middle of the answer."""
        return sum(self._lengths) + self.B * (_NEW_TOKENS // 2)

    def _engine(self, runner: str, seed: int) -> float:
        new_tokens = _NEW_TOKENS + tokens_ahead(self._lengths)
        engine = engine_of(self.model, runner, self.rows, self._prompt + _NEW_TOKENS + new_tokens)
        tokens = prompts(self.model, self.B, self._prompt, seed=seed)
        cut = [row[:length] for row, length in zip(tokens, self._lengths, strict=True)]
        return run_engine(engine, cut, new_tokens).us_per_token(skip=_WARM)

    def _torch(self, runner: str, seed: int) -> float:
        """The difference of a long and a short answer, so that the prompt does not count."""
        generation = torch_peer.generation(model_of(self.model), runner)
        tokens = prompts(self.model, self.B, self._prompt, seed=seed)
        short = generation.seconds(tokens, _WARM)
        return 1e6 * (generation.seconds(tokens, _NEW_TOKENS) - short) / (_NEW_TOKENS - _WARM)

    def _plain(self, runner: str, seed: int) -> float:
        model = model_of(self.model)
        step = plain_of(self.model, runner)
        cache = plain_jax.new_cache(
            model, batch_size=self.B, max_len=self._prompt + _NEW_TOKENS + 1
        )
        keys = iter(jax.random.split(jax.random.key(seed), 2 * len(cache)))
        cache = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape, x.dtype), cache)
        tokens = jnp.asarray(prompts(self.model, self.B, 1, seed=seed))
        length = jnp.int32(self._prompt)
        for _ in range(_WARM):
            tokens, cache, length = step(tokens, cache, length)
        jax.block_until_ready(tokens)
        start = time.perf_counter()
        for _ in range(_NEW_TOKENS - _WARM):
            tokens, cache, length = step(tokens, cache, length)
        jax.block_until_ready(tokens)
        return 1e6 * (time.perf_counter() - start) / (_NEW_TOKENS - _WARM)


def cases() -> list[DecodeCase]:
    """SmolLM2; the 8B shape in batches, ragged and long; the 7B shape of the papers."""
    return [
        *(DecodeCase(model="smollm2-135m", B=B, S=1024, others=_OTHERS) for B in (1, 8, 64)),
        DecodeCase(model="llama-3-8b", B=1, S=1024, others=_OTHERS),
        DecodeCase(model="llama-3-8b", B=8, S=1024, others=ABLATIONS),
        DecodeCase(model="llama-3-8b", B=64, S=1024, others=_OTHERS),
        DecodeCase(model="llama-3-8b", B=16, S=8192, ragged=True, rows=16, others=_OTHERS),
        DecodeCase(model="llama-3-8b", B=8, S=32_768, rows=8, others=_OTHERS, tag="stress"),
        DecodeCase(
            model="llama-2-7b", B=1, S=1024, rows=1, others=(*_OTHERS, *torch_peer.RUNNERS)
        ),
        DecodeCase(model="smollm2-135m", B=2, S=80, rows=2, tag="ci"),
        DecodeCase(
            model="smollm2-135m", B=3, S=170, ragged=True, rows=4,
            others=(*ABLATIONS[:4], SINGLE_STEPS, *torch_peer.RUNNERS), tag="ci",
        ),
    ]  # fmt: skip
