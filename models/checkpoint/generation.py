"""The sampling that a model's files recommend, checked where it is read."""

from collections.abc import Mapping
from typing import Any

from jaxinfer.models.checkpoint.header_numbers import between, whole

_BOUNDS = {"temperature": (0, 1e6), "top_p": (0, 1), "min_p": (0, 1),
           "repetition_penalty": (1e-6, 1e6)}  # fmt: skip


def recommended_sampling(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `SamplingParams` out of those of `generation_config.json`.

    `do_sample: false` is greedy whatever else is given. Where it is absent, a temperature or a
    filter says that tokens are to be drawn, which Hugging Face would not do. The temperature is 1
    where tokens are drawn and none is given. Hugging Face's default `top_k` of 50 is not taken.

    Args:
        values: The file's; null is as good as absent.

    Raises:
        ValueError: a value of the wrong type or out of its range.

    >>> recommended_sampling({"do_sample": True, "top_k": 64, "top_p": 0.95})
    {'temperature': 1.0, 'top_p': 0.95, 'top_k': 64}
    >>> recommended_sampling({"do_sample": False, "temperature": 0.7})
    {'temperature': 0.0}
    >>> recommended_sampling({"top_k": 0, "top_p": 1.0})
    {'top_p': 1.0, 'top_k': 0}
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"sampling must be an object; got {values!r:.80}")
    draws = values.get("do_sample")
    if not isinstance(draws, bool | None):
        raise ValueError(f"do_sample must be true or false; got {draws!r:.80}")
    found: dict[str, Any] = {}
    for name, (low, high) in _BOUNDS.items():
        if values.get(name) is not None:
            found[name] = between(values[name], name, low, high)
    if found.get("top_p") == 0:
        raise ValueError("top_p must be more than 0; got 0")
    if values.get("top_k") is not None:
        found["top_k"] = whole(values["top_k"], "top_k", least=-1)  # -1, as 0: all
    if draws is False:
        return found | {"temperature": 0.0}
    # Who leaves out some of the tokens wants others drawn.
    filters = found.get("top_k", 0) > 0 or found.get("top_p", 1) < 1 or found.get("min_p", 0) > 0
    if draws or filters:
        return {"temperature": 1.0} | found
    return found
