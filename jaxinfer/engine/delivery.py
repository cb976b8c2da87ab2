"""What is new in the answers, for those who wait for them."""

from jaxinfer.engine.request import Request
from jaxinfer.outputs import CompletionOutput, RequestOutput


class Outbox:
    """Unfinished requests by name, and which of them have something new.

    Only these are looked at, so that a long queue costs nothing.
    """

    def __init__(self) -> None:
        """Begin with no requests."""
        self._requests: dict[str, list[Request]] = {}
        self._news: dict[str, None] = {}  # an ordered set

    def __contains__(self, name: str) -> bool:
        return name in self._requests

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, name: str, requests: list[Request]) -> None:
        """Expect answers."""
        self._requests[name] = requests

    def discard(self, name: str) -> None:
        """Expect no more; nothing happens if there is no such request."""
        self._requests.pop(name, None)
        self._news.pop(name, None)

    def answers(self, name: str) -> list[Request]:
        """The answers of a request; none if there is no such request."""
        return self._requests.get(name, [])

    def unfinished(self) -> list[Request]:
        """All answers that still grow, in order of arrival."""
        return [r for requests in self._requests.values() for r in requests if not r.finished]

    def note(self, request: Request) -> None:
        """An answer has new tokens or has ended."""
        self._news[request.prompt.request_id] = None

    def deliver(self) -> list[RequestOutput]:
        """Hand out what is new, each token once; requests that are complete are forgotten."""
        outputs = []
        for name in self._news:
            requests = self._requests.get(name)
            if requests is None:
                continue
            prompt = requests[0].prompt
            outputs.append(
                RequestOutput(
                    request_id=name,
                    prompt=prompt.text,
                    prompt_token_ids=prompt.token_ids,
                    outputs=[_delta(request) for request in requests if _has_news(request)],
                    finished=prompt.unfinished == 0,
                    prompt_logprobs=prompt.logprobs,
                    metrics=prompt.metrics,
                )
            )
            if prompt.unfinished == 0:
                del self._requests[name]
        self._news.clear()
        return outputs


def _has_news(request: Request) -> bool:
    if request.reported:
        return False
    return request.finished or request.delivered < len(request.output_ids)


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


def merge(outputs: dict[str, RequestOutput], delta: RequestOutput) -> None:
    """Add what is new of a request to what came before of it in `outputs`."""
    whole = outputs.get(delta.request_id)
    if whole is None:
        parts = delta.outputs
        delta.outputs = []
        whole = outputs[delta.request_id] = delta
    else:
        parts = delta.outputs
        whole.finished = delta.finished
    known = {part.index: part for part in whole.outputs}
    for part in parts:
        if part.index in known:
            _extend(known[part.index], part)
        else:
            whole.outputs.append(part)
    whole.outputs.sort(key=lambda part: part.index)


def _extend(whole: CompletionOutput, part: CompletionOutput) -> None:
    whole.text += part.text
    whole.token_ids += part.token_ids
    if part.logprobs is not None:
        whole.logprobs = (whole.logprobs or []) + part.logprobs
        whole.cumulative_logprob = (whole.cumulative_logprob or 0.0) + (
            part.cumulative_logprob or 0.0
        )
    whole.finish_reason, whole.stop_reason = part.finish_reason, part.stop_reason
