"""The loop: prompts in, tokens out, with many requests in one batch.

One call of `step` computes either a prefill or a group of decode steps. Decode steps are dispatched
without waiting; while a group runs on the device, the host reads the tokens of the group before.
The host waits for the device only where the batch changes.
"""

import dataclasses
import os
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import jax

from jaxinfer.engine.allocator import PageAllocator
from jaxinfer.engine.buckets import Buckets
from jaxinfer.engine.detokenizer import Detokenizer
from jaxinfer.engine.logprobs import StepLogprobs, to_dict
from jaxinfer.engine.metrics import EngineMetrics
from jaxinfer.engine.request import Prompt, Request, request_key
from jaxinfer.engine.runner import Chunk, DecodeRow, Runner, StepResult
from jaxinfer.engine.sampling_state import SamplingFlags, logprob_bucket
from jaxinfer.engine.scheduler import Scheduler
from jaxinfer.errors import ContextLengthError, KVCacheFullError
from jaxinfer.models.decoder import Decoder
from jaxinfer.models.tokenizer.tokenizer import Tokenizer
from jaxinfer.outputs import CompletionOutput, RequestMetrics, RequestOutput
from jaxinfer.sampling_params import SamplingParams


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Sizes of an engine.

    Attributes:
        max_model_len: Longest prompt plus answer, tokens.
        num_pages: Pages in the KV cache.
        page_size: Tokens per page.
        max_num_seqs: Most requests that decode together.
        max_num_batched_tokens: Most tokens of one prefill call, padding included.
        steps_per_sync: Decode steps dispatched together.
        seed: For requests without their own.
        dtype: Of keys and values.
        implementation: Of every op that has it; None: the measured choice.
        batch_invariant: Compute every request in the same shapes whatever shares the batch.
        full_tables: Attention reads only the pages that lengths reach.
    """

    max_model_len: int
    num_pages: int
    page_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    steps_per_sync: int
    dtype: Any
    seed: int = 0
    implementation: str | None = None
    batch_invariant: bool = False
    full_tables: bool = False

    def __post_init__(self) -> None:
        for name in (
            "max_model_len", "num_pages", "page_size", "max_num_seqs", "max_num_batched_tokens",
            "steps_per_sync",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")

    @property
    def buckets(self) -> Buckets:
        """The shapes that calls are padded to."""
        return Buckets(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            table_width=-(-self.max_model_len // self.page_size),
            fixed=self.batch_invariant,
            full_tables=self.full_tables,
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Group:
    """Decode steps that were dispatched together, and the requests of their rows."""

    requests: list[Request]
    results: list[StepResult]


class Engine:
    """Continuous batching of requests over one model.

    >>> import jax.numpy as jnp
    >>> from jaxinfer.models.config import DecoderConfig
    >>> model = Decoder(DecoderConfig.tiny(), dtype=jnp.float32)
    >>> config = EngineConfig(
    ...     max_model_len=64, num_pages=8, page_size=16, max_num_seqs=2,
    ...     max_num_batched_tokens=32, steps_per_sync=2, dtype=jnp.float32,
    ... )
    >>> engine = Engine(model, None, config)
    >>> _ = engine.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=4))
    >>> tokens = []
    >>> while engine.has_work:
    ...     for output in engine.step():
    ...         tokens += output.outputs[0].token_ids
    >>> len(tokens)
    4
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer | None, config: EngineConfig):
        """Allocate the cache.

        Args:
            model: The decoder.
            tokenizer: Makes text of tokens; None: requests and answers are tokens only.
            config: Sizes.
        """
        self.config, self.tokenizer = config, tokenizer
        self.metrics = EngineMetrics()
        self.pages = PageAllocator(num_pages=config.num_pages, page_size=config.page_size)
        self.runner = Runner(
            model,
            num_pages=config.num_pages,
            page_size=config.page_size,
            buckets=config.buckets,
            dtype=config.dtype,
            implementation=config.implementation,
        )
        self._scheduler = Scheduler(self.pages, config.buckets)
        self._prompts: dict[str, list[Request]] = {}
        self._arrivals = 0
        self._in_flight: deque[_Group] = deque()
        self._rows: list[Request] | None = None  # of the device's state; None: to be set anew
        self._flags = SamplingFlags()
        self._ended: list[Request] = []  # finished, their pages perhaps still written to
        self._prefilled_last = False
        self._checked = os.environ.get("JAXINFER_DEBUG") == "1"

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished or undelivered."""
        return self._scheduler.has_work or bool(self._prompts)

    def add_request(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        request_id: str | None = None,
    ) -> str:
        """Queue a prompt; its answer comes from `step`.

        Args:
            prompt_token_ids: Tokens of the prompt.
            params: How to sample.
            prompt: The text, for the result.
            request_id: Its name; default: a number.

        Returns:
            The request's name.

        Raises:
            ValueError: an empty prompt, a token that the model does not have, or a name in use.
            ContextLengthError: the prompt leaves no room for an answer in the context.
            KVCacheFullError: the cache is too small for prompt and answer even alone.
        """
        ids = [int(token) for token in prompt_token_ids]
        name = str(self._arrivals) if request_id is None else request_id
        self._check_request(ids, params, name)
        now = time.monotonic()
        shared = Prompt(
            request_id=name, text=prompt, token_ids=ids, params=params, unfinished=params.n,
            metrics=RequestMetrics(arrival_s=now),
            logprobs=None if params.prompt_logprobs is None else [None],
        )  # fmt: skip
        room = self._longest_answer(ids)
        seed = (0, self.config.seed, self._arrivals) if params.seed is None else (1, params.seed)
        requests = []
        for index in range(params.n):
            requests.append(
                Request(
                    prompt=shared,
                    index=index,
                    arrival=self._arrivals,
                    key=request_key(*seed, index),
                    stop_ids=self._stop_ids(params),
                    max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
                    detokenizer=self._detokenizer(ids, params),
                )
            )
        self._arrivals += 1
        self._prompts[name] = requests
        self._scheduler.waiting.extend(requests)
        return name

    def abort(self, request_id: str) -> None:
        """End a request early, if there is one; its last output comes from `step`."""
        for request in self._prompts.get(request_id, []):
            if not request.finished:
                request.finish("abort")
                self._end(request)

    def discard(self, request_ids: Sequence[str]) -> None:
        """Forget finished or aborted requests whose last output nobody will fetch."""
        for name in request_ids:
            self._prompts.pop(name, None)

    def step(self) -> list[RequestOutput]:
        """Compute a little, and return what is new: per request, only new text and tokens.

        After any exception, KeyboardInterrupt included, the engine stays usable: what was being
        computed is computed again by the next call.
        """
        try:
            if self._checked:
                self.pages.check_invariants()
            if self._should_prefill():
                self._collect_all()
                self._run_prefill()
            elif self._scheduler.running:
                self._run_decode()
            else:
                self._collect_all()
            self._release_ended()
            return self._deliver()
        except BaseException:
            self._recover()
            raise

    def _check_request(self, ids: list[int], params: SamplingParams, name: str) -> None:
        if name in self._prompts:
            raise ValueError(f"request {name!r} is still unfinished; choose another request_id")
        if not ids:
            raise ValueError("prompt is empty; give at least one token")
        vocab_size = self.runner.config.vocab_size
        for token in (min(ids), max(ids), *(params.stop_token_ids or ())):
            if not 0 <= token < vocab_size:
                raise ValueError(f"token {token} does not exist: the model has {vocab_size} tokens")
        limit = self.config.max_model_len
        if len(ids) >= limit:
            raise ContextLengthError(
                f"prompt has {len(ids)} tokens; the context of {limit} tokens leaves room for at "
                f"most {limit - 1} (shorten the prompt or raise max_model_len)"
            )
        total = min(len(ids) + (params.max_tokens or 1), limit)
        needed = self.pages.pages_for(total)
        if needed > self.pages.num_pages:
            raise KVCacheFullError(
                f"prompt and answer of up to {total} tokens need {needed} KV-cache pages, but "
                f"there are {self.pages.num_pages} of {self.pages.page_size} tokens "
                f"(lower max_tokens, or raise num_gpu_blocks_override or gpu_memory_utilization)"
            )
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer; use stop_token_ids")

    def _longest_answer(self, ids: list[int]) -> int:
        """Tokens that context and cache leave for an answer."""
        capacity = self.pages.num_pages * self.pages.page_size
        return min(self.config.max_model_len, capacity) - len(ids)

    def _stop_ids(self, params: SamplingParams) -> tuple[int, ...]:
        own = () if params.ignore_eos or self.tokenizer is None else self.tokenizer.eos_ids
        return tuple(dict.fromkeys((*own, *(params.stop_token_ids or ()))))

    def _detokenizer(self, ids: list[int], params: SamplingParams) -> Detokenizer | None:
        if self.tokenizer is None:
            return None
        return Detokenizer(
            self.tokenizer,
            prefix=ids[-4:],
            stop=tuple(params.stop or ()),
            keep_stop=params.include_stop_str_in_output,
            skip_special=params.skip_special_tokens,
        )

    def _should_prefill(self) -> bool:
        # Between the chunks of a long prompt, those who decode get a turn.
        if self._scheduler.prefilling is not None and self._prefilled_last:
            return not self._scheduler.running
        return self._scheduler.can_prefill()

    def _run_prefill(self) -> None:
        requests = self._scheduler.next_prefill()
        if not requests:
            return
        self._prefilled_last = True
        chunks = [self._chunk(request) for request in requests]
        wanted = [r.params.prompt_logprobs for r in requests if self._wants_prompt_logprobs(r)]
        params = [request.params for request in requests]
        flags = SamplingFlags.of(params, min_tokens=any(p.min_tokens for p in params))
        now = time.monotonic()
        for request in requests:
            metrics = request.prompt.metrics
            if metrics.queue_s is None:
                metrics.queue_s = now - metrics.arrival_s
        top = logprob_bucket(max(w for w in wanted if w is not None)) if wanted else None
        result = jax.device_get(self.runner.prefill(chunks, flags=flags, prompt_top=top))
        for i, (request, chunk) in enumerate(zip(requests, chunks, strict=True)):
            self.metrics.prompt_tokens += len(chunk.tokens)
            if self._wants_prompt_logprobs(request):
                self._note_prompt_logprobs(request, chunk, result.prompt_logprobs, i)
            if self._scheduler.prefilled(request, len(chunk.tokens)):
                self._rows = None
                self._take(request, int(result.tokens[i]), result.logprobs, i)

    def _chunk(self, request: Request) -> Chunk:
        start = request.cached
        stop = start + self._scheduler.chunk(request)
        targets = None
        if self._wants_prompt_logprobs(request):
            targets = request.prompt.token_ids[start + 1 : stop + 1]
        return Chunk(
            tokens=request.tokens(start, stop),
            targets=targets,
            start=start,
            pages=self.pages.owned(request),
            row=request.row(),
        )

    def _wants_prompt_logprobs(self, request: Request) -> bool:
        known = request.prompt.logprobs
        return (
            known is not None and request.index == 0 and len(known) < len(request.prompt.token_ids)
        )

    def _note_prompt_logprobs(
        self, request: Request, chunk: Chunk, report: StepLogprobs, row: int
    ) -> None:
        known, wanted = request.prompt.logprobs, request.params.prompt_logprobs
        assert known is not None
        assert wanted is not None
        for t, token in enumerate(chunk.targets or ()):
            known.append(to_dict(report, (row, t), token, wanted, self._describe))

    @property
    def _describe(self):
        return None if self.tokenizer is None else self.tokenizer.token

    def _run_decode(self) -> None:
        self._prefilled_last = False
        if self._rows is None:
            self._collect_all()
        steps = self._steps_ahead()
        if steps > 0 and not self._reserve(steps):
            self._collect_all()
            steps = self._steps_ahead()
            while steps > 0 and not self._reserve(steps):
                self._scheduler.preempt_youngest()
                self.metrics.preemptions += 1
                self._rows = None
                steps = self._steps_ahead()
        if steps > 0:
            self._dispatch(steps)
        # One group stays ahead of the host while the batch is stable.
        while len(self._in_flight) > (1 if steps > 0 else 0):
            self._collect()

    def _steps_ahead(self) -> int:
        """Steps worth dispatching now: none if all rows will have ended."""
        ahead = sum(len(group.results) for group in self._in_flight)
        left = max((r.remaining for r in self._scheduler.running), default=0) - ahead
        return min(self.config.steps_per_sync, left)

    def _reserve(self, steps: int) -> bool:
        """Give every running request pages for the tokens of the next steps."""
        ahead = sum(len(group.results) for group in self._in_flight)
        missing = 0
        lengths = {}
        for request in self._scheduler.running:
            # The latest token is written by the next step; the last one of an answer never is.
            written = min(ahead + steps, request.remaining)
            lengths[request] = request.num_tokens - 1 + written
            missing += self.pages.missing(request, num_tokens=lengths[request])
        if missing > self.pages.num_free:
            return False
        for request, length in lengths.items():
            self.pages.grow(request, num_tokens=length)
        if missing and self._rows is not None:
            self.runner.set_tables([self.pages.owned(r) for r in self._rows])
        return True

    def _dispatch(self, steps: int) -> None:
        if self._rows is None:
            assert not self._in_flight, "rows are set between groups"
            self._rows = list(self._scheduler.running)
            params = [request.params for request in self._rows]
            self._flags = SamplingFlags.of(params, min_tokens=any(p.min_tokens for p in params))
            rows = [
                DecodeRow(
                    token=request.tokens(request.num_tokens - 1, request.num_tokens)[0],
                    length=request.num_tokens - 1,
                    budget=request.remaining,
                    row=request.row(),
                )
                for request in self._rows
            ]
            tables = [self.pages.owned(request) for request in self._rows]
            self.runner.set_rows(rows, tables, flags=self._flags)
        group = _Group(requests=self._rows, results=[])
        self._in_flight.append(group)
        for _ in range(steps):
            group.results.append(self.runner.decode(flags=self._flags))
        self.metrics.decode_steps += steps

    def _collect_all(self) -> None:
        while self._in_flight:
            self._collect()

    def _collect(self) -> None:
        """Wait for the oldest group and hand its tokens to their requests."""
        group = self._in_flight[0]
        results = jax.device_get(group.results)
        self._in_flight.popleft()
        for result in results:
            for row, request in enumerate(group.requests):
                token = int(result.tokens[row])
                if token >= 0 and not request.finished:
                    self._take(request, token, result.logprobs, row)
                elif token >= 0:
                    self.metrics.wasted_steps += 1

    def _take(self, request: Request, token: int, report: StepLogprobs | None, row: int) -> None:
        wanted = request.params.logprobs
        described = None
        if wanted is not None:
            assert report is not None
            described = to_dict(report, (row,), token, wanted, self._describe)
        self.metrics.output_tokens += 1
        request.append(token, described)
        if request.finished:
            self._end(request)

    def _end(self, request: Request) -> None:
        self._rows = None
        self.metrics.requests += 1
        if request in self._scheduler.running:
            self._scheduler.running.remove(request)
            self._ended.append(request)
        else:
            self._scheduler.remove(request)

    def _release_ended(self) -> None:
        """Take back pages once no dispatched step can write to them."""
        if not self._in_flight:
            for request in self._ended:
                self._scheduler.remove(request)
            self._ended.clear()

    def _recover(self) -> None:
        """Forget what was being computed, so that the next step computes it again."""
        self._in_flight.clear()
        self._rows = None
        self._release_ended()
        scheduler = self._scheduler
        active = [*scheduler.running, *([scheduler.prefilling] if scheduler.prefilling else [])]
        held = [r for requests in self._prompts.values() for r in requests if not r.finished]
        # A request between queue and batch when the exception came is in neither.
        lost = [r for r in held if r not in active and r not in scheduler.waiting]
        for request in sorted((*active, *lost), key=lambda r: (r.arrival, r.index), reverse=True):
            scheduler.requeue(request)
        self.runner.reset_if_lost()

    def _deliver(self) -> list[RequestOutput]:
        outputs = []
        for name, requests in list(self._prompts.items()):
            fresh = [r for r in requests if r.delivered < len(r.output_ids) or r.finished]
            fresh = [r for r in fresh if not r.reported]
            if not fresh:
                continue
            shared = requests[0].prompt
            finished = shared.unfinished == 0
            outputs.append(
                RequestOutput(
                    request_id=name,
                    prompt=shared.text,
                    prompt_token_ids=shared.token_ids,
                    outputs=[_delta(request) for request in fresh],
                    finished=finished,
                    prompt_logprobs=shared.logprobs,
                    metrics=shared.metrics,
                )
            )
            if finished:
                del self._prompts[name]
        return outputs


def _delta(request: Request) -> CompletionOutput:
    """What is new in an answer since it was last delivered."""
    new = slice(request.delivered, len(request.output_ids))
    request.delivered = len(request.output_ids)
    request.reported = request.finished
    logprobs = request.logprobs[new] if request.params.logprobs is not None else None
    ids = request.output_ids[new]
    total = None
    if logprobs is not None:
        total = sum(entry[token].logprob for entry, token in zip(logprobs, ids, strict=True))
    text = ""
    if request.detokenizer is not None:
        text = request.detokenizer.delta(finished=request.finished)
    return CompletionOutput(
        index=request.index, text=text, token_ids=ids, cumulative_logprob=total, logprobs=logprobs,
        finish_reason=request.finish_reason, stop_reason=request.stop_reason,
    )  # fmt: skip
