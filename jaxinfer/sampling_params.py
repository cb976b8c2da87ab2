"""How to turn scores into tokens, for one request; names and meaning as in vLLM."""

import dataclasses
import difflib
import math
import numbers
from typing import Any

MAX_LOGPROBS = 20
LEAST_TEMPERATURE = 1e-5  # below it the best token is taken, as in vLLM
# The device divides in float32, where 1e39 is infinite and every quotient 0 or not a number, so
# that a token that was ruled out may be drawn. At 1e6 all are as good as equally likely already.
_LARGEST = 1e6


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling, stopping and reporting of one request.

    The defaults are those below, also where `LLM.generate`, `chat` and `stream` are called without
    parameters: what a model's authors recommend (`open_checkpoint(…).generation.sampling`) is used
    by the commands `generate` and `chat` only, and has to be passed here by others. Filters apply
    after the temperature, in the order min-p, top-k, top-p, each to what the one before left.

    Attributes:
        n: Answers per prompt, each with its own random numbers.
        temperature: Divisor of the logits, at most 1e6; 0, or less than 1e-5, is greedy.
        top_p: Keep the most probable tokens whose share of what the other filters left is at least
            this, in (0, 1]; 1: all.
        top_k: Keep this many most probable tokens; 0 (or -1): all.
        min_p: Keep tokens at least this probable relative to the best one, in [0, 1].
        seed: Makes the answer reproducible whatever shares the batch; None: from the engine's
            seed and the request's number.
        presence_penalty: Subtracted from the logit of every token already in the answer.
        frequency_penalty: Subtracted once per occurrence in the answer.
        repetition_penalty: Divides positive and multiplies negative logits of tokens in prompt or
            answer (Keskar et al., 2019); 1e-6 to 1e6.
        stop: Strings that end the answer; they are cut off unless `include_stop_str_in_output`.
        stop_token_ids: Tokens that end the answer, besides the model's own.
        ignore_eos: Do not stop at the model's end-of-text tokens.
        max_tokens: Longest answer, tokens; None: until the context is full.
        min_tokens: No end-of-text or stop token before this many tokens, and no stop string counts
            that ends in their text.
        logprobs: Report log-probabilities of this many best tokens at every step (0: of the
            chosen token alone).
        prompt_logprobs: The same for the tokens of the prompt.
        include_stop_str_in_output: Keep the stop string in the text. Concerns `stop` alone: a stop
            token is always in the answer's tokens and never in its text.
        skip_special_tokens: Leave special tokens out of the text.

    Raises:
        ValueError: a value outside of its range; the message names the field.
        TypeError: an unknown field, or a value of the wrong type.

    >>> SamplingParams(temperature=0.7, top_p=0.9, max_tokens=64).temperature
    0.7
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: str | list[str] | tuple[str, ...] | None = None
    stop_token_ids: list[int] | tuple[int, ...] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else _as_tuple("stop", self.stop)
        object.__setattr__(self, "stop", stop)
        stop_ids = _as_tuple("stop_token_ids", self.stop_token_ids)
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        self._check_numbers()
        for text in stop:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop must be non-empty strings; got {text!r}")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise ValueError(
                    f"stop must be valid Unicode; {text!r} holds half of a surrogate pair, as "
                    "Python makes of bytes that are not UTF-8"
                )
        for token in stop_ids:
            if not _is_int(token) or token < 0:
                raise ValueError(f"stop_token_ids must be token ids; got {token!r}")
        object.__setattr__(self, "stop_token_ids", tuple(map(int, stop_ids)))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must not exceed max_tokens; got {self.min_tokens} > {self.max_tokens}"
            )

    def _check_numbers(self) -> None:
        """Check ranges, and make plain Python numbers of others, such as NumPy's."""
        bounds = {
            "n": (int, 1, None), "top_k": (int, 0, None), "min_tokens": (int, 0, None),
            "temperature": (float, 0, _LARGEST), "min_p": (float, 0, 1), "top_p": (float, 0, 1),
            "repetition_penalty": (float, 1 / _LARGEST, _LARGEST),
            "presence_penalty": (float, -2, 2), "frequency_penalty": (float, -2, 2),
            "max_tokens": (int, 1, None), "seed": (int, 0, 2**63 - 1),
            "logprobs": (int, 0, MAX_LOGPROBS), "prompt_logprobs": (int, 0, MAX_LOGPROBS),
        }  # fmt: skip
        optional = {"max_tokens", "seed", "logprobs", "prompt_logprobs"}
        for name, (kind, low, high) in bounds.items():
            given: Any = getattr(self, name)
            if given is None and name in optional:
                continue
            if not _is_int(given) and (kind is int or not _is_real(given)):
                what = "an integer" if kind is int else "a number"
                raise TypeError(f"{name} must be {what}; got {given!r}")
            value = given if type(given) is int else kind(given)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be finite; got {value!r}")
            if value < low or (high is not None and value > high):
                raise ValueError(f"{name} must be {_span(kind, low, high)}; got {value!r}")
            object.__setattr__(self, name, value)
        if self.top_p == 0:
            raise ValueError("top_p must be more than 0; got 0")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SamplingParams":
        """From a dictionary, such as a parsed request.

        Raises:
            TypeError: an unknown name; the message gives the nearest known one.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
                raise TypeError(f"unknown sampling parameter {name!r}{hint}")
        return cls(**values)

    def replace(self, **fields: Any) -> "SamplingParams":
        """A copy with some fields replaced, checked again."""
        return dataclasses.replace(self, **fields)

    @property
    def is_greedy(self) -> bool:
        """Whether no random number is drawn."""
        return self.temperature < LEAST_TEMPERATURE

    @property
    def has_filters(self) -> bool:
        """Whether some tokens are ruled out by rank or probability."""
        return not self.is_greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def has_penalties(self) -> bool:
        """Whether earlier tokens change the logits."""
        return (
            self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
        )


def _as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple | None):
        raise TypeError(f"{name} must be a list; got {value!r}")
    return tuple(value or ())


def _span(kind: type, low: float, high: float | None) -> str:
    show = str if kind is int else "{:g}".format
    return f"at least {show(low)}" if high is None else f"between {show(low)} and {show(high)}"


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
