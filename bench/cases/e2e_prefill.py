"""Time to first token: from handing over a prompt to its first token on the host.

Every prompt comes to a device that has rested: a GPU at its power limit lowers its clock, so
whoever gets longer pauses between prompts would look faster.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from bench import plain_jax
from bench.case import Measurement
from bench.whole_model import (
    MODELS,
    RUNNERS,
    engine_of,
    kv_bytes,
    measurement,
    model_of,
    plain_of,
    prompts,
    run_engine,
    weight_bytes,
)

_REST_S = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillCase:
    """One prompt of T tokens.

    Attributes:
        model: Whose shape.
        T: Tokens of the prompt.
        tag: As in `Case`.
    """

    model: str
    T: int
    tag: str = "primary"

    @property
    def name(self) -> str:
        """As in `Case`."""
        return f"{self.model} b1 t{self.T}"

    @property
    def flops(self) -> float:
        """Products with the weights (the output's for one token), and causal attention."""
        config = MODELS[self.model]()
        output = config.vocab_size * config.hidden_size
        embedding = 0 if config.tie_embeddings else output
        layers = config.num_parameters - output - embedding
        attention = 2 * config.num_layers * config.num_heads * config.head_dim * self.T**2
        return 2 * (layers * self.T + output) + attention

    @property
    def bytes(self) -> float:
        """Weights once, and the new keys and values."""
        config = MODELS[self.model]()
        return weight_bytes(config) + kv_bytes(config, self.T)

    @property
    def implementations(self) -> tuple[str, ...]:
        """The engine with the chooser and with XLA only, and plain JAX."""
        return RUNNERS

    def measure(self, implementation: str, *, repeats: int) -> Measurement:
        """Time prompts; see `Case.measure`."""
        once = self._plain if implementation.startswith("plain_") else self._engine
        runs = max(2, repeats // 2)
        return measurement(self.model, implementation, once, runs=runs, tokens=self.T)

    def _engine(self, runner: str, seed: int) -> float:
        engine = engine_of(self.model, runner, 1, 8448)
        tokens = prompts(self.model, 1, self.T, seed=seed)
        time.sleep(_REST_S)
        return 1e6 * run_engine(engine, tokens, 1).events[0][0]

    def _plain(self, runner: str, seed: int) -> float:
        call = plain_of(self.model, runner)
        cache = plain_jax.new_cache(model_of(self.model), batch_size=1, max_len=self.T)
        tokens = prompts(self.model, 1, self.T, seed=seed)
        jax.block_until_ready(cache)
        time.sleep(_REST_S)
        start = time.perf_counter()
        best, _, _ = call(jnp.asarray(tokens), cache, jnp.int32(0))
        np.asarray(best)
        return 1e6 * (time.perf_counter() - start)


def cases() -> list[PrefillCase]:
    """SmolLM2 and the 8B shape."""
    return [
        *(PrefillCase(model="smollm2-135m", T=T) for T in (512, 2048)),
        *(PrefillCase(model="llama-3-8b", T=T) for T in (1024, 4096, 5000, 8192)),
        PrefillCase(model="smollm2-135m", T=64, tag="ci"),
    ]
