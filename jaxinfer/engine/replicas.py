"""Several engines that share the requests: data parallelism."""

import dataclasses
from collections.abc import Sequence

from jaxinfer.engine.config import EngineConfig
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.metrics import EngineMetrics
from jaxinfer.outputs import RequestOutput
from jaxinfer.sampling_params import SamplingParams


class Replicas:
    """Engines with the same weights on different devices, used like one `Engine`.

    A request stays on the engine that it was given to: the one that has the fewest then. All are
    driven by one thread. While it waits for the tokens of one, the others compute what they were
    given before, a group of steps each.
    """

    def __init__(self, engines: Sequence[Engine]):
        """Take over engines that have no requests.

        Args:
            engines: At least one; all with the same sizes and one counter of arrivals.
        """
        self.engines = list(engines)
        self._homes: dict[str, Engine] = {}  # of unfinished requests
        self._news: list[RequestOutput] = []

    @property
    def config(self) -> EngineConfig:
        """Sizes of each engine."""
        return self.engines[0].config

    @property
    def metrics(self) -> EngineMetrics:
        """Sums over all engines, as of now; None where none has a number."""
        sums: dict[str, int | None] = {}
        for field in dataclasses.fields(EngineMetrics):
            found = [getattr(engine.metrics, field.name) for engine in self.engines]
            known = [number for number in found if number is not None]
            sums[field.name] = sum(known) if known else None
        return EngineMetrics(**sums)  # type: ignore[arg-type]

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished or undelivered."""
        return bool(self._news) or any(engine.has_work for engine in self.engines)

    def check_request(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Raise what `add_request` would raise, and queue nothing."""
        self.engines[0].check_request(prompt_token_ids, params)

    def add_request(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        request_id: str | None = None,
    ) -> str:
        """Queue a prompt; arguments and errors as in `Engine.add_request`."""
        if request_id in self._homes:
            raise ValueError(f"request {request_id!r} is still unfinished; choose another name")
        given = list(self._homes.values())
        engine = min(self.engines, key=given.count)
        name = engine.add_request(prompt_token_ids, params, prompt=prompt, request_id=request_id)
        self._homes[name] = engine
        return name

    def abort(self, request_id: str) -> None:
        """End a request early, if there is one; its last output comes from `step`."""
        if (engine := self._homes.get(request_id)) is not None:
            engine.abort(request_id)

    def discard(self, request_ids: Sequence[str]) -> None:
        """Abort requests whose output nobody will fetch, and forget them."""
        for name in request_ids:
            if (engine := self._homes.pop(name, None)) is not None:
                engine.discard([name])

    def step(self) -> list[RequestOutput]:
        """Compute a little on every engine that has work, and return what is new.

        After any exception all stay usable, and what the engines before the one that failed have
        delivered comes from the next call.
        """
        for engine in self.engines:
            if engine.has_work:
                self._news += engine.step()
        news, self._news = self._news, []
        for output in news:
            if output.finished:
                self._homes.pop(output.request_id, None)
        return news

    def check_invariants(self) -> None:
        """As in `Engine`."""
        for engine in self.engines:
            engine.check_invariants()
