"""Sizes of an engine."""

import dataclasses
from numbers import Integral, Real
from typing import Any

from jaxinfer.engine.buckets import Buckets


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Sizes of an engine.

    Attributes:
        max_model_len: Longest prompt plus answer, tokens.
        num_pages: Pages in the KV cache.
        page_size: Tokens per page, on all devices that share it.
        max_num_seqs: Most requests that decode together.
        max_num_batched_tokens: Most tokens of one prefill call, padding included.
        steps_per_sync: Decode steps dispatched together.
        steps_per_program: Decode steps in one compiled program, which saves the host calls;
            divides `steps_per_sync`. Programs run whole: the last steps of the last answer may be
            for nothing.
        seed: For requests without their own.
        dtype: Of keys and values.
        implementation: As for `dispatch.parse_forced`; None: the measured choice.
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
    steps_per_program: int = 1

    def __post_init__(self) -> None:
        for name in (
            "max_model_len", "num_pages", "page_size", "max_num_seqs", "max_num_batched_tokens",
            "steps_per_sync", "steps_per_program",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")
        if self.steps_per_sync % self.steps_per_program:
            raise ValueError(
                f"steps_per_program must divide steps_per_sync={self.steps_per_sync}; "
                f"got {self.steps_per_program}"
            )

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


def check_sizes(
    *,
    max_model_len: int | None = None,
    max_num_seqs: int | None = None,
    max_num_batched_tokens: int | None = None,
    block_size: int | None = None,
    gpu_memory_utilization: float | None = None,
    num_gpu_blocks_override: int | None = None,
    steps_per_sync: int | None = None,
    seed: int | None = None,
) -> None:
    """Refuse what is wrong for every model, before there is one; arguments as in `jaxinfer.LLM`.

    Raises:
        ValueError: a size that is not positive or does not exist, a share of memory outside of
            (0, 1], a negative seed.
        TypeError: a size or seed that is no integer, a share that is no number.
    """
    asked = {
        "max_model_len": max_model_len, "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens, "steps_per_sync": steps_per_sync,
        "num_gpu_blocks_override": num_gpu_blocks_override,
    }  # fmt: skip
    for name, value in (asked | {"seed": seed, "block_size": block_size}).items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
            raise TypeError(f"{name} must be an integer; got {value!r}")
    share = gpu_memory_utilization
    if share is not None and (isinstance(share, bool) or not isinstance(share, Real)):
        raise TypeError(f"gpu_memory_utilization must be a number; got {share!r}")
    if seed is not None and seed < 0:
        raise ValueError(f"seed must not be negative; got {seed}")
    if gpu_memory_utilization is not None and not 0 < gpu_memory_utilization <= 1:
        raise ValueError(
            f"gpu_memory_utilization must be more than 0 and at most 1; "
            f"got {gpu_memory_utilization}"
        )
    for name, value in asked.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be positive; got {value}")
    if block_size is not None:
        from jaxinfer.models.cache import PAGE_SIZES  # with it comes JAX, which takes long

        if block_size not in PAGE_SIZES:
            raise ValueError(f"block_size must be one of {PAGE_SIZES}; got {block_size}")
