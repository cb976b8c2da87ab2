"""One answer in the making."""

import dataclasses
import time

import numpy as np

from jaxinfer.engine.detokenizer import Detokenizer
from jaxinfer.engine.sampling_state import Row
from jaxinfer.outputs import FinishReason, RequestMetrics, TokenLogprobs
from jaxinfer.sampling_params import SamplingParams


@dataclasses.dataclass(kw_only=True, eq=False, slots=True)
class Prompt:
    """What the answers of one request share.

    Attributes:
        request_id: Its name.
        text: As given, or None if it came as tokens.
        token_ids: Its tokens.
        params: How to sample.
        metrics: Timing.
        logprobs: Of the prompt's tokens, filled while it is prefilled.
        unfinished: Answers that still grow.
    """

    request_id: str
    text: str | None
    token_ids: list[int]
    params: SamplingParams
    metrics: RequestMetrics
    logprobs: list[TokenLogprobs | None] | None = None
    unfinished: int = 1


@dataclasses.dataclass(kw_only=True, eq=False, slots=True)
class Request:
    """One answer to a prompt: the unit that is scheduled.

    Attributes:
        prompt: The prompt and what its answers share.
        index: Which of the answers.
        arrival: Order of arrival over all requests.
        key: Random key.
        stop_ids: Tokens that end it.
        max_tokens: Longest answer that parameters and context allow.
        detokenizer: Makes text, or None without a tokenizer.
        output_ids: The answer so far.
        logprobs: Per token, if asked for.
        cached: Tokens whose keys and values are in the cache.
        delivered: Tokens already given out.
        reported: Whether the end has been given out.
        finish_reason: Why it ended.
        stop_reason: Stop string or token that ended it.
    """

    prompt: Prompt
    index: int
    arrival: int
    key: tuple[int, int]
    stop_ids: tuple[int, ...]
    max_tokens: int
    detokenizer: Detokenizer | None
    output_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    cached: int = 0
    delivered: int = 0
    reported: bool = False
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    @property
    def params(self) -> SamplingParams:
        """How to sample."""
        return self.prompt.params

    @property
    def num_tokens(self) -> int:
        """Prompt and answer so far."""
        return len(self.prompt.token_ids) + len(self.output_ids)

    @property
    def finished(self) -> bool:
        """Whether the answer is complete."""
        return self.finish_reason is not None

    @property
    def remaining(self) -> int:
        """Tokens that the answer may still get."""
        return self.max_tokens - len(self.output_ids)

    @property
    def _may_stop(self) -> bool:
        """Whether the newest token comes after the `min_tokens` that the answer has to have."""
        return len(self.output_ids) > self.params.min_tokens

    def tokens(self, start: int, stop: int) -> list[int]:
        """A part of prompt and answer."""
        prompt = len(self.prompt.token_ids)
        if stop <= prompt:
            return self.prompt.token_ids[start:stop]
        answer = self.output_ids[max(start - prompt, 0) : stop - prompt]
        return self.prompt.token_ids[start:] + answer

    def row(self) -> Row:
        """The request as the sampler sees it."""
        return Row(
            params=self.params,
            key=self.key,
            stop_ids=self.stop_ids,
            prompt_ids=self.prompt.token_ids,
            output_ids=self.output_ids,
        )

    def append(self, token: int, logprobs: TokenLogprobs | None) -> None:
        """Take the next token of the answer, and notice if it is the last."""
        self.output_ids.append(token)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        metrics = self.prompt.metrics
        metrics.output_tokens += 1
        metrics.total_s = time.monotonic() - metrics.arrival_s
        if metrics.ttft_s is None:
            metrics.ttft_s = metrics.total_s
        if token in self.stop_ids:
            named = token in (self.params.stop_token_ids or ())
            self.finish("stop", token if named else None)
        elif self.detokenizer is not None and self.detokenizer.step(token, may_stop=self._may_stop):
            self.finish("stop", self.detokenizer.stop_reason)
        elif self.remaining <= 0:
            self.finish("length")

    def finish(self, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        """End the answer; nothing happens if it has ended."""
        if self.finished:
            return
        self.finish_reason, self.stop_reason = reason, stop_reason
        self.prompt.unfinished -= 1
        if self.detokenizer is not None:
            self.detokenizer.finish()


def request_key(*numbers: int) -> tuple[int, int]:
    """Two well-mixed 32-bit numbers out of a few others.

    >>> request_key(1, 2) == request_key(1, 2) != request_key(2, 1)
    True
    """
    first, second = np.random.SeedSequence(numbers).generate_state(2)
    return int(first), int(second)
