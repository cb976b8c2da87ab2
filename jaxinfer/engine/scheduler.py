"""Who computes next: waiting requests, running requests, and the pages between them."""

from collections import deque
from collections.abc import Sequence

from jaxinfer.engine.allocator import PageAllocator
from jaxinfer.engine.buckets import Buckets
from jaxinfer.engine.request import Request


class Scheduler:
    """First come, first served.

    A request waits, is prefilled (in one chunk or several), runs, and ends. When pages run out,
    the youngest request that has some goes back to the head of the queue; its answer so far is
    kept and prefilled again with its prompt.

    Attributes:
        pages: The page allocator.
        waiting: Requests without pages, oldest first.
        prefilling: The request whose prompt is partly in the cache, or None.
        running: Requests that decode, oldest first.
    """

    def __init__(self, pages: PageAllocator, buckets: Buckets):
        """Start with nothing to do."""
        self.pages = pages
        self.waiting: deque[Request] = deque()
        self.prefilling: Request | None = None
        self.running: list[Request] = []
        self._buckets = buckets

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.waiting or self.running or self.prefilling)

    def can_prefill(self) -> bool:
        """Whether a prompt, or its next chunk, could be computed now."""
        if self.prefilling is not None:
            return True
        return bool(self.waiting) and self._fits(self.waiting[0], taken=0)

    def next_prefill(self) -> list[Request]:
        """Requests whose next chunk is computed now, with pages for it; perhaps none.

        Several prompts share a call if each fits whole and together they fit the token budget.
        """
        if self.prefilling is not None:
            return [self.prefilling]
        chosen: list[Request] = []
        limit = self._buckets.max_num_batched_tokens
        padded = 0
        while self.waiting and self._fits(self.waiting[0], taken=len(chosen)):
            request = self.waiting[0]
            whole = request.num_tokens <= limit
            if whole:
                widest = max(padded, self._buckets.prefill_tokens(request.num_tokens))
                rows = 1 << len(chosen).bit_length()  # the row bucket that holds one more
                rows = len(chosen) + 1 if not chosen else rows
                if chosen and (self._buckets.fixed or rows * widest > limit):
                    break
                padded = widest
            elif chosen:
                break
            self.waiting.popleft()
            grown = self.pages.grow(request, num_tokens=request.num_tokens)
            assert grown, "checked by _fits"
            chosen.append(request)
            if not whole:
                self.prefilling = request
                break
        return chosen

    def chunk(self, request: Request) -> int:
        """Tokens of the request's next chunk."""
        return min(request.num_tokens - request.cached, self._buckets.max_num_batched_tokens)

    def ends_prompt(self, requests: Sequence[Request]) -> bool:
        """Whether the next chunk of each is its last; a chunk that is not comes alone."""
        return all(r.cached + self.chunk(r) == r.num_tokens for r in requests)

    def prefilled(self, request: Request, count: int) -> bool:
        """Note that a chunk is in the cache; True if the prompt is complete and now runs."""
        request.cached += count
        if request.cached < request.num_tokens:
            return False
        if self.prefilling is request:
            self.prefilling = None
        self.running.append(request)
        return True

    def preempt_youngest(self) -> Request:
        """Take the pages of the youngest request that has some; it will be prefilled again."""
        holders = [*self.running, *([self.prefilling] if self.prefilling else [])]
        request = max(holders, key=lambda r: (r.arrival, r.index))
        self.requeue(request)
        request.prompt.metrics.preemptions += 1
        return request

    def requeue(self, request: Request) -> None:
        """Put an unfinished request back to the head of the queue, without pages."""
        self.remove(request)
        request.cached = 0
        self.waiting.appendleft(request)

    def remove(self, request: Request) -> None:
        """Forget a request, wherever it is, and take back its pages."""
        if self.prefilling is request:
            self.prefilling = None
        elif request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self.pages.release(request)

    def check_invariants(self) -> None:
        """Pages belong to requests that compute, and reach all that is in the cache.

        Raises:
            AssertionError: a defect of the engine.
        """
        computing = [*self.running, *([self.prefilling] if self.prefilling else [])]
        idle = self.pages.owners - set(computing)
        if idle:
            raise AssertionError(f"{len(idle)} requests hold pages but do not compute")
        for request in computing:
            cached = request.cached if request is self.prefilling else request.num_tokens - 1
            if self.pages.missing(request, num_tokens=cached):
                raise AssertionError(f"a request of {cached} cached tokens lacks pages for them")
        if len(self.running) > self._buckets.max_num_seqs:
            raise AssertionError(f"{len(self.running)} requests decode together")

    def _fits(self, request: Request, *, taken: int) -> bool:
        rows = len(self.running) + taken + (self.prefilling is not None)
        if rows >= self._buckets.max_num_seqs:
            return False
        # Room for the next token of everybody, so that decoding does not preempt at once.
        growing = sum(self._will_grow(other) for other in self.running) + taken
        needed = self.pages.pages_for(request.num_tokens + 1) + growing
        return needed <= self.pages.num_free

    def _will_grow(self, request: Request) -> bool:
        """Whether the rest of a running answer may need another page."""
        end = request.num_tokens + request.remaining - 1  # the last token is never written
        return self.pages.missing(request, num_tokens=end) > 0
