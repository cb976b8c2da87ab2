"""One streamed answer, and how fast it came."""

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from jaxinfer.errors import NonFiniteScoresError
from jaxinfer.progress import CompileWatch, Reporter

if TYPE_CHECKING:
    from jaxinfer.llm import LLM
    from jaxinfer.sampling_params import SamplingParams

_PLACE = re.compile(r"^prompts\[(\d+)\]:")  # the library counts from 0


@dataclasses.dataclass(kw_only=True)
class Answer:
    """An answer while it grows.

    Attributes:
        text: So far.
        token_ids: So far.
        finish_reason: `"stop"`, `"length"`, or None while it grows or if it was interrupted.
        cut_off: What ended it by `"length"`, for people.
        ttft_s: Time to the first token, seconds, compilation included; None before it.
        ttft_compile_s: Of it, compilation.
        first_tokens: Tokens that came then.
        seconds: From the prompt to the latest token.
        compile_s: Of it, compilation.
    """

    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    cut_off: str = ""
    ttft_s: float | None = None
    ttft_compile_s: float = 0.0
    first_tokens: int = 0
    seconds: float = 0.0
    compile_s: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Rate after the first piece, compilation left out; None where all came at once."""
        later = len(self.token_ids) - self.first_tokens
        if self.ttft_s is None or later < 1:
            return None
        computing = self.seconds - self.ttft_s - (self.compile_s - self.ttft_compile_s)
        return later / computing if computing > 0 else None

    def speed(self) -> str:
        """One line for people."""
        if self.ttft_s is None:
            return "no tokens"
        rate = self.tokens_per_second
        parts = [counted(len(self.token_ids), "token")]
        parts += [f"{rate:.1f} tokens/s"] if rate else []
        spent = self.ttft_compile_s
        compiling = f" ({spent:.2f} s of it compiling)" if spent >= 0.05 else ""
        parts.append(f"first token after {self.ttft_s:.2f} s{compiling}")
        parts += [self.cut_off] if self.cut_off else []
        return ", ".join(parts)


def counted(number: int, what: str) -> str:
    """A number and what it counts.

    >>> counted(1, "token"), counted(2, "token")
    ('1 token', '2 tokens')
    """
    return f"{number} {what}" + "s" * (number != 1)


@contextlib.contextmanager
def naming(prompts: Sequence[str]) -> Iterator[None]:
    """Let an error speak of the prompts as they were typed: the engine is given tokens."""
    try:
        yield
    except NonFiniteScoresError as error:
        raise NonFiniteScoresError.of_prompt(prompts[error.index]) from error
    except ValueError as error:
        error.args = (_PLACE.sub(lambda found: f"prompt {int(found[1]) + 1}:", str(error)),)
        raise


def stream_answer(
    llm: "LLM",
    prompt_ids: Sequence[int],
    params: "SamplingParams",
    write: Callable[[str], None],
    reporter: Reporter,
    answer: Answer,
) -> None:
    """Generate, handing out text as it comes.

    Args:
        llm: The engine.
        prompt_ids: Tokens of the prompt.
        params: How to sample.
        write: Called with each piece of text.
        reporter: Shows that the first token is waited for.
        answer: Filled in; holds what came so far if this is interrupted.
    """
    start = time.perf_counter()
    with contextlib.ExitStack() as waiting, CompileWatch() as watch:
        waiting.enter_context(reporter.task("first token", quiet=True))
        for output in llm.stream(list(prompt_ids), params):
            answer.seconds = time.perf_counter() - start
            if answer.ttft_s is None:
                answer.ttft_s, answer.ttft_compile_s = answer.seconds, watch.seconds
                answer.first_tokens = len(output.outputs[0].token_ids)
                waiting.close()  # the bar goes before text comes
            piece = output.outputs[0]
            answer.compile_s = watch.seconds
            answer.token_ids.extend(piece.token_ids)
            answer.finish_reason = piece.finish_reason
            answer.text += piece.text
            if piece.finish_reason == "length":
                answer.cut_off = _cut_off(llm, params, len(answer.token_ids))
            if piece.text:
                write(piece.text)


def _cut_off(llm: "LLM", params: "SamplingParams", tokens: int) -> str:
    if params.max_tokens is not None and tokens >= params.max_tokens:
        return "cut off at --max-tokens"
    return f"the context of {llm.engine.config.max_model_len} tokens is full (--max-model-len)"
