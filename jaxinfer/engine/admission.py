"""What becomes of a prompt before it is queued: refused, or made into requests."""

import contextlib
import operator
import time
from collections.abc import Iterator, Sequence
from typing import SupportsIndex

import jax
import numpy as np

from jaxinfer.engine.allocator import pages_for
from jaxinfer.engine.config import EngineConfig
from jaxinfer.engine.detokenizer import Detokenizer
from jaxinfer.engine.request import Prompt, Request, request_key
from jaxinfer.errors import ContextLengthError, KVCacheFullError
from jaxinfer.models.tokenizer.tokenizer import Tokenizer
from jaxinfer.outputs import RequestMetrics
from jaxinfer.sampling_params import SamplingParams


class Admission:
    """Refuses what could never run, so that nothing in the queue can block it for ever."""

    def __init__(self, config: EngineConfig, tokenizer: Tokenizer | None, *, vocab_size: int):
        """Note what limits a request.

        Args:
            config: Sizes of the engine.
            tokenizer: Makes text of tokens, and knows those that end it; or None.
            vocab_size: V of the model.
        """
        self._config, self._tokenizer, self._vocab_size = config, tokenizer, vocab_size

    def check(self, prompt_token_ids: Sequence[SupportsIndex], params: SamplingParams) -> list[int]:
        """The prompt's tokens as plain integers; errors as in `Engine.add_request`."""
        ids = plain_tokens(prompt_token_ids)
        if not ids:
            raise ValueError("prompt is empty; give at least one token")
        self._check_tokens((min(ids), max(ids)), "")
        self._check_tokens(params.stop_token_ids or (), "stop_token_ids: ")
        limit = self._config.max_model_len
        check_length(len(ids), limit)
        total = min(len(ids) + (params.max_tokens or 1), limit)
        needed = pages_for(total, self._config.page_size)
        if needed > self._config.num_pages:
            raise KVCacheFullError(
                f"prompt and answer of up to {total} tokens need {needed} KV-cache pages, but "
                f"there are {self._config.num_pages} of {self._config.page_size} tokens "
                f"(lower max_tokens, or raise num_gpu_blocks_override or gpu_memory_utilization)"
            )
        if params.stop and self._tokenizer is None:
            raise ValueError("stop strings need a tokenizer; use stop_token_ids")
        return ids

    def _check_tokens(self, ids: Sequence[int], where: str) -> None:
        for token in ids:
            if not 0 <= token < self._vocab_size:
                raise ValueError(
                    f"{where}token {token} does not exist: the model has {self._vocab_size} tokens"
                )

    def requests(
        self, ids: list[int], params: SamplingParams, *, name: str, text: str | None, arrival: int
    ) -> list[Request]:
        """One request per answer.

        Args:
            ids: From `check`.
            params: How to sample.
            name: The request's name.
            text: The prompt as given, or None.
            arrival: Number of the request; decides the random numbers of one without a seed.
        """
        prompt = Prompt(
            request_id=name, text=text, token_ids=ids, params=params, unfinished=params.n,
            metrics=RequestMetrics(arrival_s=time.monotonic()),
            logprobs=None if params.prompt_logprobs is None else [None],
        )  # fmt: skip
        capacity = self._config.num_pages * self._config.page_size
        room = min(self._config.max_model_len, capacity) - len(ids)
        seed = (0, self._config.seed, arrival) if params.seed is None else (1, params.seed)
        return [
            Request(
                prompt=prompt,
                index=index,
                arrival=arrival,
                key=request_key(*seed, index),
                stop_ids=self._stop_ids(params),
                max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
                detokenizer=self._detokenizer(ids, params),
            )
            for index in range(params.n)
        ]

    def _stop_ids(self, params: SamplingParams) -> tuple[int, ...]:
        own = () if params.ignore_eos or self._tokenizer is None else self._tokenizer.eos_ids
        return tuple(dict.fromkeys((*own, *(params.stop_token_ids or ()))))

    def _detokenizer(self, ids: list[int], params: SamplingParams) -> Detokenizer | None:
        if self._tokenizer is None:
            return None
        return Detokenizer(
            self._tokenizer,
            prefix=ids[-4:],
            stop=tuple(params.stop or ()),
            keep_stop=params.include_stop_str_in_output,
            skip_special=params.skip_special_tokens,
        )


def check_length(tokens: int, limit: int) -> None:
    """Refuse a prompt that leaves no room for an answer.

    Args:
        tokens: Of the prompt.
        limit: Of prompt and answer.

    Raises:
        ContextLengthError: there is no room.
    """
    if tokens >= limit:
        raise ContextLengthError(
            f"prompt has {tokens} tokens; the context of {limit} tokens leaves room for at "
            f"most {limit - 1} (shorten the prompt, or raise max_model_len if the model's own "
            "context is longer)"
        )


@contextlib.contextmanager
def about(name: str) -> Iterator[None]:
    """Let a ValueError begin with what it is about, one prompt of several; "" for the only one."""
    try:
        yield
    except ValueError as error:
        if name:
            error.args = (f"{name}: {error}",)
        raise


def plain_tokens(prompt_token_ids: Sequence[SupportsIndex] | np.ndarray | jax.Array) -> list[int]:
    """Tokens as plain integers.

    Raises:
        TypeError: they are none.
    """
    # Python takes bytes for lists of integers, and truth values for 0 and 1; people mean neither.
    if isinstance(prompt_token_ids, bytes | bytearray | memoryview):
        raise _no_tokens(prompt_token_ids)
    try:
        given = prompt_token_ids
        if isinstance(given, np.ndarray | jax.Array):  # at once, not every number by itself
            given = np.asarray(given).tolist()
        kinds = set(map(type, given))
        ids = list(map(operator.index, given))
    except TypeError:
        raise _no_tokens(prompt_token_ids) from None
    if bool in kinds:
        raise _no_tokens(prompt_token_ids)
    return ids


def _no_tokens(prompt: object) -> TypeError:
    return TypeError(f"a prompt must be a list of token ids (integers); got {prompt!r:.80}")
