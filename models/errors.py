"""Errors of models and checkpoints that a caller can mend."""


class CheckpointError(ValueError):
    """A checkpoint is missing, truncated, corrupt or inconsistent; the message names the file."""


class UnsupportedModelError(CheckpointError):
    """An architecture or quantisation type is not implemented; the message names those that are."""


class NonFiniteScoresError(RuntimeError):
    """A model's scores are NaN or infinite: its weights are damaged, or its dtype is too narrow.

    Attributes:
        index: Place of the prompt among those of the call; 0 where there is one only.
    """

    def __init__(self, where: str, *, index: int = 0):
        """Say where, and what to do.

        Args:
            where: What was computed, for the message.
            index: See the attribute.
        """
        self.index = index
        super().__init__(
            f"the model's scores for {where} are not finite (NaN or infinity): its weights are "
            "damaged, or numbers overflow in its dtype (try float32 or bfloat16)"
        )

    @classmethod
    def of_prompt(cls, text: str, *, index: int = 0) -> "NonFiniteScoresError":
        """The error for a prompt, whose beginning the message shows."""
        return cls(repr(text if len(text) <= 60 else text[:60] + "…"), index=index)


class ContextLengthError(ValueError):
    """A prompt, or prompt plus requested tokens, exceeds what the model or the cache holds."""
