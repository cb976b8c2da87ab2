"""One engine for several threads: whoever waits for an answer drives it, one at a time, for all."""

import contextlib
import dataclasses
import threading
from collections import deque
from collections.abc import Iterable, Sequence

from jaxinfer.engine.engine import Engine
from jaxinfer.engine.replicas import Replicas
from jaxinfer.outputs import RequestOutput
from jaxinfer.sampling_params import SamplingParams

_NOTICE_S = 0.5  # an interrupt may come between the end of a step and the notice of it


@dataclasses.dataclass(kw_only=True, eq=False, slots=True)
class Ticket:
    """A request on its way.

    Attributes:
        ids: Tokens of the prompt.
        params: How to sample.
        text: The prompt, if it came as text.
        inbox: Where its outputs go.
        name: What the engine calls it; None before it is there.
    """

    ids: Sequence[int]
    params: SamplingParams
    text: str | None
    inbox: "Inbox"
    name: str | None = None


Inbox = deque[tuple[Ticket, RequestOutput | Exception]]


class SharedEngine:
    """Gives requests of several threads to one engine, and the outputs back to each.

    Only the thread that drives touches the engine. A request that comes meanwhile, or that nobody
    waits for any more, is noted and dealt with before the next step. Nothing that a finaliser may
    call waits for a lock: the collector may run it inside of a step of the same thread.
    """

    def __init__(self, engine: Engine | Replicas):
        """Take charge of an engine."""
        self._engine = engine
        self._tickets: dict[str, Ticket] = {}  # by name; of requests that are in the engine
        self._coming: deque[Ticket] = deque()
        self._leaving: deque[Ticket] = deque()
        self._lock = threading.Lock()  # of `_driven`; never held during a step
        self._changed = threading.Condition(self._lock)
        self._driven = False

    def check_request(self, ids: Sequence[int], params: SamplingParams) -> None:
        """As in `Engine`."""
        self._engine.check_request(ids, params)

    def add(
        self, ids: Sequence[int], params: SamplingParams, text: str | None, inbox: Inbox
    ) -> Ticket:
        """Note a request that `check_request` has let pass."""
        ticket = Ticket(ids=ids, params=params, text=text, inbox=inbox)
        self._coming.append(ticket)
        return ticket

    def advance(self, inbox: Inbox) -> None:
        """Compute, or let another thread compute, until something is in `inbox`.

        Raises:
            RuntimeError: nothing can come any more.
        """
        while not inbox:
            drives = False
            try:
                with self._lock:
                    while self._driven and not inbox:
                        self._changed.wait(_NOTICE_S)
                    if inbox:
                        return
                    drives = self._driven = True
                self._step(inbox)
            finally:
                if drives:
                    self._driven = False
                    with self._lock:
                        self._changed.notify_all()
                self._settle()

    def forget(self, tickets: Iterable[Ticket]) -> None:
        """End requests that nobody waits for any more; never waits."""
        self._leaving.extend(tickets)
        self._settle()

    def _step(self, inbox: Inbox) -> None:
        self._take_out()
        self._take_in()
        if inbox:  # a refusal
            return
        if not self._engine.has_work:
            raise RuntimeError("the request was taken out of the engine by someone else")
        for output in self._engine.step():
            if (ticket := self._tickets.get(output.request_id)) is not None:
                ticket.inbox.append((ticket, output))

    def _take_in(self) -> None:
        while self._coming:
            ticket = self._coming[0]
            try:
                if ticket.name is None:
                    ticket.name = self._engine.add_request(
                        ticket.ids, ticket.params, prompt=ticket.text
                    )
                self._tickets[ticket.name] = ticket
            except Exception as error:  # for the thread that it belongs to
                ticket.inbox.append((ticket, error))
            self._coming.popleft()

    def _take_out(self) -> None:
        while self._leaving:
            ticket = self._leaving[0]
            if ticket.name is None:
                with contextlib.suppress(ValueError):
                    self._coming.remove(ticket)
            else:
                self._engine.discard([ticket.name])
                self._tickets.pop(ticket.name, None)
            self._leaving.popleft()

    def _settle(self) -> None:
        """Take out who leaves, unless another thread or frame is at it and will do that."""
        while self._leaving and self._lock.acquire(blocking=False):
            try:
                if self._driven:
                    return
                self._take_out()
            finally:
                self._lock.release()
