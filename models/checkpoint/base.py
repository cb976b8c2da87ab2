"""What every checkpoint reader offers."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxinfer.models.config import DecoderConfig
from jaxinfer.models.tokenizer.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GenerationDefaults:
    """What a model's files say about generating with it.

    Attributes:
        eos_token_ids: Tokens that end an answer.
        sampling: Fields of `SamplingParams` that the model's authors recommend.
    """

    eos_token_ids: tuple[int, ...] = ()
    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)


@runtime_checkable
class Checkpoint(Protocol):
    """A model's files, opened but not read.

    Attributes:
        path: Where they are, for messages.
        config: The model's shape.
        generation: Defaults for generating.
    """

    path: str
    config: DecoderConfig
    generation: GenerationDefaults

    def read(self, name: str) -> np.ndarray:
        """One weight by its canonical name (`models.weights`), matrices `[in, out]`.

        Raises:
            CheckpointError: the weight is missing or damaged.
        """
        ...

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            CheckpointError: there is none, or it has more tokens than the model, or far fewer.
        """
        ...
