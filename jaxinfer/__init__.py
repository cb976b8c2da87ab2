"""Efficient inference of large language models in JAX.

>>> import jaxinfer
>>> jaxinfer.SamplingParams(temperature=0).is_greedy
True

Names are imported when they are first used, so that `import jaxinfer` costs little.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxinfer.llm import LLM
    from jaxinfer.models.cache import PagedKVCache
    from jaxinfer.models.checkpoint.open import load_model, open_checkpoint
    from jaxinfer.models.config import DecoderConfig
    from jaxinfer.models.decoder import Decoder
    from jaxinfer.models.functions import decode_step, forward, logits, prefill
    from jaxinfer.outputs import CompletionOutput, RequestOutput
    from jaxinfer.sampling_params import SamplingParams

__version__ = "0.1.0"

_HOME = {
    "LLM": "jaxinfer.llm",
    "SamplingParams": "jaxinfer.sampling_params",
    "RequestOutput": "jaxinfer.outputs",
    "CompletionOutput": "jaxinfer.outputs",
    "Decoder": "jaxinfer.models.decoder",
    "DecoderConfig": "jaxinfer.models.config",
    "PagedKVCache": "jaxinfer.models.cache",
    "open_checkpoint": "jaxinfer.models.checkpoint.open",
    "load_model": "jaxinfer.models.checkpoint.open",
    "forward": "jaxinfer.models.functions",
    "prefill": "jaxinfer.models.functions",
    "decode_step": "jaxinfer.models.functions",
    "logits": "jaxinfer.models.functions",
}

__all__ = [
    "LLM",
    "CompletionOutput",
    "Decoder",
    "DecoderConfig",
    "PagedKVCache",
    "RequestOutput",
    "SamplingParams",
    "decode_step",
    "forward",
    "load_model",
    "logits",
    "open_checkpoint",
    "prefill",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
