"""Errors of the engine."""

from jaxinfer.models.errors import (
    CheckpointError,
    ContextLengthError,
    NonFiniteScoresError,
    UnsupportedModelError,
)

__all__ = [
    "CheckpointError",
    "ContextLengthError",
    "KVCacheFullError",
    "NonFiniteScoresError",
    "UnsupportedModelError",
]


class KVCacheFullError(ValueError):
    """A request needs more KV-cache pages than there are, so that it could never run."""
