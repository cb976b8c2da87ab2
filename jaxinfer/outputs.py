"""What a request gives back; names as in vLLM."""

import dataclasses
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Logprob:
    """One token's log-probability under the model, before temperature and penalties.

    Attributes:
        logprob: Natural logarithm.
        rank: 1 for the most probable token.
        decoded_token: Its text, if a tokenizer is there.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


type TokenLogprobs = dict[int, Logprob]
"""By token id: the best tokens of a step, and the one that was chosen."""


@dataclasses.dataclass(kw_only=True, slots=True)
class CompletionOutput:
    """One answer, or what is new in it while streaming.

    Attributes:
        index: Which of the request's `n` answers.
        text: The text.
        token_ids: The tokens, the one that stopped it included.
        cumulative_logprob: Sum over the tokens, if log-probabilities were asked for.
        logprobs: Per token, if asked for.
        finish_reason: `"stop"`, `"length"`, `"abort"`, `"error"` (scores that were not finite;
            `LLM` raises `NonFiniteScoresError` instead), or None while it grows.
        stop_reason: The stop string or token id that ended it; None for end of text.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclasses.dataclass(kw_only=True, slots=True)
class RequestMetrics:
    """When things happened to a request.

    Attributes:
        arrival_s: Seconds of a monotonic clock.
        queue_s: From arrival to the start of its first prefill; None before.
        ttft_s: From arrival to the first token, seconds; None before.
        total_s: From arrival to the latest token.
        output_tokens: Tokens produced, over all answers.
        preemptions: Times it was put back for lack of cache pages.
    """

    arrival_s: float
    queue_s: float | None = None
    ttft_s: float | None = None
    total_s: float = 0.0
    output_tokens: int = 0
    preemptions: int = 0

    @property
    def tokens_per_s(self) -> float | None:
        """Rate after the first token; None for a single token."""
        if self.ttft_s is None or self.output_tokens < 2 or self.total_s <= self.ttft_s:
            return None
        return (self.output_tokens - 1) / (self.total_s - self.ttft_s)


@dataclasses.dataclass(kw_only=True, slots=True)
class RequestOutput:
    """A request and its answers.

    Attributes:
        request_id: As given or counted by the engine.
        prompt: Text, if the request came as text.
        prompt_token_ids: Its tokens.
        outputs: The answers, by index.
        finished: Whether all answers are complete.
        prompt_logprobs: Per prompt token (None for the first), if asked for.
        metrics: Timing.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    metrics: RequestMetrics
