"""The loop: prompts in, tokens out, with many requests in one batch.

One call of `step` computes either a prefill or a group of decode steps. Decode steps are dispatched
without waiting; while a group runs on the device, the host reads the tokens of the group before.
The host waits for the device only where the batch changes.
"""

import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from jaxinfer.engine.admission import Admission
from jaxinfer.engine.allocator import PageAllocator
from jaxinfer.engine.batch import Chunk, DecodeRow, StepResult
from jaxinfer.engine.config import EngineConfig
from jaxinfer.engine.delivery import Outbox
from jaxinfer.engine.logprobs import StepLogprobs, to_dict
from jaxinfer.engine.metrics import EngineMetrics
from jaxinfer.engine.request import Request
from jaxinfer.engine.runner import Runner
from jaxinfer.engine.sampler import NOT_FINITE
from jaxinfer.engine.sampling_state import SamplingFlags, logprob_bucket
from jaxinfer.engine.scheduler import Scheduler
from jaxinfer.models.decoder import Decoder
from jaxinfer.models.tokenizer.tokenizer import Tokenizer
from jaxinfer.outputs import RequestOutput
from jaxinfer.pallas_kernels.debug import is_debugging
from jaxinfer.sampling_params import SamplingParams

__all__ = ["Engine", "EngineConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Group:
    """Decode steps that were dispatched together, and the requests of their rows."""

    requests: list[Request]
    results: list[StepResult]

    @property
    def steps(self) -> int:
        """How many there are."""
        return sum(result.steps for result in self.results)


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

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer | None,
        config: EngineConfig,
        *,
        arrivals: Iterator[int] | None = None,
    ):
        """Allocate the cache.

        Args:
            model: The decoder.
            tokenizer: Makes text of tokens; None: requests and answers are tokens only.
            config: Sizes.
            arrivals: Numbers the requests, which decides the random numbers of those without a
                seed; engines that share requests share it.
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
            batch_invariant=config.batch_invariant,
            steps_per_program=config.steps_per_program,
        )
        self._admission = Admission(config, tokenizer, vocab_size=model.config.vocab_size)
        self._buckets = config.buckets
        self._scheduler = Scheduler(self.pages, self._buckets)
        self._outbox = Outbox()
        self._arrivals = itertools.count() if arrivals is None else arrivals
        self._in_flight: deque[_Group] = deque()
        self._rows: list[Request] | None = None  # of the device's state; None: to be set anew
        self._tables: list[list[int]] = []  # of these rows, as the device has them
        self._latest: set[Request] = set()  # of the latest rows that were set
        self._flags = SamplingFlags()  # of these
        self._prefilled_last = False
        self._checked = is_debugging()

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished or undelivered."""
        return self._scheduler.has_work or len(self._outbox) > 0

    def check_request(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Raise what `add_request` would raise, and queue nothing."""
        self._admission.check(prompt_token_ids, params)

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
            TypeError: a prompt that is not a list of integers.
            ValueError: an empty prompt, a token that the model does not have, or a name in use.
            ContextLengthError: the prompt leaves no room for an answer in the context.
            KVCacheFullError: the cache is too small for prompt and answer even alone.
        """
        ids = self._admission.check(prompt_token_ids, params)
        arrival = next(self._arrivals)
        name = str(arrival) if request_id is None else request_id
        if name in self._outbox:
            raise ValueError(f"request {name!r} is still unfinished; choose another request_id")
        requests = self._admission.requests(ids, params, name=name, text=prompt, arrival=arrival)
        self._outbox.add(name, requests)
        self._scheduler.waiting.extend(requests)
        return name

    def abort(self, request_id: str) -> None:
        """End a request early, if there is one; its last output comes from `step`."""
        for request in self._outbox.answers(request_id):
            if not request.finished:
                request.finish("abort")
                self._end(request, stops_itself=False)

    def discard(self, request_ids: Sequence[str]) -> None:
        """Abort requests whose output nobody will fetch, and forget them."""
        for name in request_ids:
            self.abort(name)
            self._outbox.discard(name)

    def step(self) -> list[RequestOutput]:
        """Compute a little, and return what is new: per request, only new text and tokens.

        An answer for which the model's scores are NaN or infinite ends with the `finish_reason`
        `"error"`; others go on.

        After any exception, KeyboardInterrupt included, the engine stays usable: what was being
        computed is computed again by the next call.
        """
        try:
            if self._checked:
                self.check_invariants()
            if self._should_prefill():
                self._collect_all()
                self._run_prefill()
            elif self._scheduler.running:
                self._run_decode()
            else:
                self._collect_all()
            return self._outbox.deliver()
        except BaseException:
            self._recover()
            raise
        finally:
            self.metrics.compilations_total = self.runner.programs

    def check_invariants(self) -> None:
        """No page is lost, held twice, or held by a request that does not compute.

        Called at every step where the environment has JAXINFER_DEBUG=1; there, what is given to
        the device is checked too.

        Raises:
            AssertionError: a defect of the engine.
        """
        self.pages.check_invariants()
        self._scheduler.check_invariants()

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
        if self._checked:
            for request, chunk in zip(requests, chunks, strict=True):
                end = chunk.start + len(chunk.tokens)
                self.pages.check_table(request, chunk.pages, num_tokens=end)
        wanted = [r.params.prompt_logprobs for r in requests if self._wants_prompt_logprobs(r)]
        ends = self._scheduler.ends_prompt(requests)
        flags = _flags(requests) if ends else None
        now = time.monotonic()
        for request in requests:
            metrics = request.prompt.metrics
            if metrics.queue_s is None:
                metrics.queue_s = now - metrics.arrival_s
        top = logprob_bucket(max(w for w in wanted if w is not None)) if wanted else None
        result: Any = self.runner.prefill(chunks, flags=flags, prompt_top=top)
        if ends or top is not None:  # else the next chunk need not wait for this one
            result = jax.device_get(result)
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
            # After an exception a chunk may be computed twice.
            if len(known) == chunk.start + t + 1:
                known.append(to_dict(report, (row, t), token, wanted, self._describe))

    @property
    def _describe(self) -> Callable[[int], str] | None:
        return None if self.tokenizer is None else self.tokenizer.token

    def _run_decode(self) -> None:
        self._prefilled_last = False
        if self._rows is not None and self._should_narrow(len(self._rows)):
            self._rows = None
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

    def _should_narrow(self, rows: int) -> bool:
        """Whether enough of the rows have ended to go on with fewer.

        Rows that have ended cost little, a compilation takes long: half the rows are worth it only
        if the narrower step is there already.
        """
        running = self._scheduler.running
        now, then = self._buckets.rows(rows), self._buckets.rows(max(len(running), 1))
        if 4 * then <= now:
            return True
        longest = max((len(self.pages.owned(request)) for request in running), default=0)
        return then < now and self.runner.has_decoder(then, longest, flags=self._flags)

    def _steps_ahead(self) -> int:
        """Steps worth dispatching now, in whole programs: none if all rows will have ended."""
        programs = -(-self._steps_left() // self.config.steps_per_program)
        return min(self.config.steps_per_sync, programs * self.config.steps_per_program)

    def _steps_left(self) -> int:
        """Steps that the longest answer may still need beyond those in flight."""
        ahead = sum(group.steps for group in self._in_flight)
        return max((r.remaining for r in self._scheduler.running), default=0) - ahead

    def _length_after(self, request: Request, steps: int) -> int:
        """Tokens of a request in the cache after the steps in flight and so many more."""
        ahead = sum(group.steps for group in self._in_flight)
        # The latest token is written by the next step; the last one of an answer never is.
        return request.num_tokens - 1 + min(ahead + steps, request.remaining)

    def _reserve(self, steps: int) -> bool:
        """Give every running request pages for the tokens of the next steps."""
        missing = 0
        lengths = {}
        for request in self._scheduler.running:
            lengths[request] = self._length_after(request, steps)
            missing += self.pages.missing(request, num_tokens=lengths[request])
        if missing > self.pages.num_free:
            return False
        for request, length in lengths.items():
            self.pages.grow(request, num_tokens=length)
        if missing and self._rows is not None:
            self.runner.set_tables(self._tables_of(self._rows))
        return True

    def _tables_of(self, requests: Sequence[Request]) -> list[list[int]]:
        self._tables = [list(self.pages.owned(request)) for request in requests]
        return self._tables

    def _check_tables(self, steps: int) -> None:
        """What the device has of rows that go on is theirs, and lasts for the next steps."""
        assert self._rows is not None
        for request, table in zip(self._rows, self._tables, strict=True):
            if not request.finished:  # else its row on the device has ended too
                length = self._length_after(request, steps)
                self.pages.check_table(request, table, num_tokens=length)

    def _dispatch(self, steps: int) -> None:
        if self._rows is None:
            assert not self._in_flight, "rows are set between groups"
            known, self._rows = self._latest, list(self._scheduler.running)
            self._latest = set(self._rows)
            if not self._latest <= known:  # those who stay keep the step that is compiled for them
                self._flags = _flags(self._rows)
            rows = [
                DecodeRow(
                    token=request.tokens(request.num_tokens - 1, request.num_tokens)[0],
                    length=request.num_tokens - 1,
                    budget=request.remaining,
                    row=request.row(),
                )
                for request in self._rows
            ]
            self.runner.set_rows(rows, self._tables_of(self._rows), flags=self._flags)
        if self._checked:
            self._check_tables(steps)
        self.metrics.idle_steps += max(steps - self._steps_left(), 0)
        group = _Group(requests=self._rows, results=[])
        self._in_flight.append(group)
        for result in self.runner.decode(steps, flags=self._flags):
            group.results.append(result)
        self.metrics.decode_steps += steps

    def _collect_all(self) -> None:
        while self._in_flight:
            self._collect()

    def _collect(self) -> None:
        """Wait for the oldest group and hand its tokens to their requests."""
        group = self._in_flight[0]
        results = jax.device_get(group.results)
        self._in_flight.popleft()
        for result in itertools.chain.from_iterable(result.each() for result in results):
            if result.softmax_fallbacks is not None:
                before = self.metrics.softmax_fallbacks or 0
                self.metrics.softmax_fallbacks = before + int(result.softmax_fallbacks)
            for row, request in enumerate(group.requests):
                token = int(result.tokens[row])
                if token != -1 and not request.finished:
                    self._take(request, token, result.logprobs, row)
                elif token != -1:
                    self.metrics.wasted_steps += 1

    def _take(self, request: Request, token: int, report: StepLogprobs | None, row: int) -> None:
        if token == NOT_FINITE:  # its row on the device has ended too
            request.finish("error")
            self._end(request, stops_itself=True)
            return
        wanted = request.params.logprobs
        described = None
        if wanted is not None:
            assert report is not None
            described = to_dict(report, (row,), token, wanted, self._describe)
        self.metrics.output_tokens += 1
        request.append(token, described)
        self._outbox.note(request)
        if request.finished:
            # Stop tokens and lengths are seen on the device too; stop strings only here.
            stops_itself = token in request.stop_ids or request.remaining <= 0
            self._end(request, stops_itself=stops_itself)

    def _end(self, request: Request, *, stops_itself: bool) -> None:
        """Take a finished request out, and its pages back.

        Steps that were dispatched before may still write to the pages, but whatever the next
        owner writes is dispatched later, and the device keeps that order.

        Args:
            request: Finished.
            stops_itself: Its row on the device has become inactive by itself.
        """
        self.metrics.requests += 1
        self._outbox.note(request)
        self._scheduler.remove(request)
        if not stops_itself and self._rows is not None and request in self._rows:
            self._rows = None

    def _recover(self) -> None:
        """Forget what was being computed, so that the next step computes it again."""
        self._in_flight.clear()
        self._rows = None
        queued = set(self._scheduler.waiting)
        # Some may be between queue and batch, in neither.
        again = [request for request in self._outbox.unfinished() if request not in queued]
        for request in sorted(again, key=lambda r: (r.arrival, r.index), reverse=True):
            self._scheduler.requeue(request)
        self.runner.reset_if_lost()


def _flags(requests: Sequence[Request]) -> SamplingFlags:
    """What the sampler needs for these requests."""
    params = [request.params for request in requests]
    return SamplingFlags.of(params, min_tokens=any(p.min_tokens for p in params))
