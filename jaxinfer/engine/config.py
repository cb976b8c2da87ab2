"""Sizes of an engine."""

import dataclasses
from typing import Any

from jaxinfer.engine.buckets import Buckets


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Sizes of an engine.

    Attributes:
        max_model_len: Longest prompt plus answer, tokens.
        num_pages: Pages in the KV cache.
        page_size: Tokens per page.
        max_num_seqs: Most requests that decode together.
        max_num_batched_tokens: Most tokens of one prefill call, padding included.
        steps_per_sync: Decode steps dispatched together.
        seed: For requests without their own.
        dtype: Of keys and values.
        implementation: Of every op that has it; None: the measured choice.
        batch_invariant: Compute every request in the same shapes whatever shares the batch.
        full_tables: Attention of decode steps reads only the pages that lengths reach.
    """

    max_model_len: int
    num_pages: int
    page_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    steps_per_sync: int
    dtype: Any
    seed: int = 0
    implementation: str | None = None
    batch_invariant: bool = False
    full_tables: bool = False

    def __post_init__(self) -> None:
        for name in (
            "max_model_len", "num_pages", "page_size", "max_num_seqs", "max_num_batched_tokens",
            "steps_per_sync",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")

    @property
    def buckets(self) -> Buckets:
        """The shapes that calls are padded to."""
        return Buckets(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            table_width=-(-self.max_model_len // self.page_size),
            fixed=self.batch_invariant,
            full_tables=self.full_tables,
        )
