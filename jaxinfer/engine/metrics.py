"""What an engine has done so far."""

import dataclasses


@dataclasses.dataclass(kw_only=True, slots=True)
class EngineMetrics:
    """Counters since the engine was made.

    Attributes:
        requests: Answers finished.
        prompt_tokens: Prefilled, repeated prefills included.
        output_tokens: Produced.
        decode_steps: Steps dispatched.
        idle_steps: Of these, steps after the end of all answers: programs of several run whole.
        wasted_steps: Row-steps whose token came after the end of its answer.
        preemptions: Requests put back for lack of pages.
        softmax_fallbacks: Pieces of decode attention that a unified softmax could not serve and
            that were computed again with the online one. None: no unified softmax has been run.
        compilations_total: Prefills and decode steps compiled, each for a shape or a set of
            sampling features that was new. It stands still once the traffic has shown all it has.
    """

    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    decode_steps: int = 0
    idle_steps: int = 0
    wasted_steps: int = 0
    preemptions: int = 0
    softmax_fallbacks: int | None = None
    compilations_total: int = 0
