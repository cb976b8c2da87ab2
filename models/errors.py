"""Errors of models and checkpoints that a caller can mend."""


class CheckpointError(ValueError):
    """A checkpoint is missing, truncated, corrupt or inconsistent; the message names the file."""


class UnsupportedModelError(CheckpointError):
    """An architecture or quantisation type is not implemented; the message names those that are."""


class ContextLengthError(ValueError):
    """A prompt, or prompt plus requested tokens, exceeds what the model or the cache holds."""
