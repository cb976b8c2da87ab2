"""What goes into the compiled functions of the engine, and what comes out."""

import dataclasses
from collections.abc import Sequence

import jax

from jaxinfer.engine.logprobs import StepLogprobs
from jaxinfer.engine.sampling_state import Row, SamplingState
from jaxinfer.models.pytree import pytree


@pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeState:
    """Rows that decode together.

    Attributes:
        token: `[B]` int32, latest token of each row, not yet in the cache.
        active: `[B]` bool, rows that take part.
        budget: `[B]` int32, tokens a row may still get.
        lengths: `[B]` int32, tokens in the cache.
        page_table: `[B, M]` int32.
        sampling: Parameters and progress of the sampler.
    """

    token: jax.Array
    active: jax.Array
    budget: jax.Array
    lengths: jax.Array
    page_table: jax.Array
    sampling: SamplingState


@pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillInputs:
    """Chunks of prompts that are computed together.

    Attributes:
        tokens: `[B, T]` int32, padded on the right.
        targets: `[B, T]` int32, the token after each, or None where nobody asks.
        start: `[B]` int32, tokens already in the cache.
        count: `[B]` int32, real tokens among the T.
        page_table: `[B, M]` int32.
    """

    tokens: jax.Array
    targets: jax.Array | None
    start: jax.Array
    count: jax.Array
    page_table: jax.Array


@pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class StepResult:
    """What the host needs to know of one call; arrays on the device until fetched.

    A call of several decode steps has a first axis for them in all arrays.

    Attributes:
        tokens: `[B]` int32 chosen tokens; -1 for rows that took no part, `NOT_FINITE` for those
            whose scores were no numbers.
        logprobs: Of the chosen tokens, or None.
        prompt_logprobs: `[B, T]` of the targets, or None.
        softmax_fallbacks: int32, how often a unified softmax of this step fell back, over all
            layers; None where no layer has one.
    """

    tokens: jax.Array
    logprobs: StepLogprobs | None = None
    prompt_logprobs: StepLogprobs | None = None
    softmax_fallbacks: jax.Array | None = None

    @property
    def steps(self) -> int:
        """How many steps it is of; of several if its arrays have a first axis for them."""
        return 1 if self.tokens.ndim == 1 else len(self.tokens)

    def each(self) -> list["StepResult"]:
        """Of every step, once fetched."""
        if self.tokens.ndim == 1:
            return [self]
        return [jax.tree.map(lambda x, i=i: x[i], self) for i in range(self.steps)]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A part of one sequence to prefill.

    Attributes:
        tokens: Its tokens.
        targets: The token after each, or None.
        start: Tokens of the sequence already in the cache.
        pages: The sequence's pages.
        row: The request as the sampler sees it.
    """

    tokens: Sequence[int]
    targets: Sequence[int] | None
    start: int
    pages: Sequence[int]
    row: Row


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DecodeRow:
    """One sequence that decodes.

    Attributes:
        token: Its latest token.
        length: Tokens in the cache.
        budget: Tokens it may still get.
        row: The request as the sampler sees it.
    """

    token: int
    length: int
    budget: int
    row: Row
