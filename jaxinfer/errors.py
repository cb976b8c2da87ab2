"""Errors that a caller of the engine can mend."""

from jaxinfer.models.errors import CheckpointError, ContextLengthError, UnsupportedModelError

__all__ = [
    "CheckpointError",
    "ContextLengthError",
    "KVCacheFullError",
    "UnsupportedModelError",
]


class KVCacheFullError(ValueError):
    """A request needs more KV-cache pages than there are, so that it could never run."""
