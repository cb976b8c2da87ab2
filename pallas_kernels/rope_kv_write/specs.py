"""Named shapes of `rope_kv_write`, shared by tests and benchmarks."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RopeWriteSpec:
    """One case of `rope_kv_write`.

    Attributes:
        model: Model whose head counts these are; first word of the case name.
        B: Requests.
        T: Tokens of each.
        N: Query heads.
        K: KV heads.
        H: Head dimension.
        page_size: p.
        start: Position of token 0: one number for all rows, or one per row.
        num_tokens: Real tokens per row; None: all T.
        dtype: Of q, k, v and pages.
        tag: `"ci"` (seconds in the interpreter), `"primary"` (reported) or `"stress"`.
    """

    model: str
    B: int
    T: int
    N: int
    K: int
    H: int
    page_size: int = 64
    start: int | tuple[int, ...] = 0
    num_tokens: tuple[int, ...] | None = None
    dtype: str = "bfloat16"
    tag: Literal["ci", "primary", "stress"] = "primary"

    @property
    def name(self) -> str:
        """Case name in results: model shape first, lower case."""
        parts = [self.model, f"b{self.B}", f"t{self.T}"]
        parts += [f"p{self.page_size}"] if self.page_size != 64 else []
        parts += ["ragged"] if self.num_tokens is not None else []
        parts += [self.dtype] if self.dtype != "bfloat16" else []
        return " ".join(parts)

    @property
    def starts(self) -> np.ndarray:
        """`[B]` int32 positions of token 0."""
        return np.array(np.broadcast_to(self.start, (self.B,)), np.int32)

    @property
    def counts(self) -> np.ndarray:
        """`[B]` int32 real tokens."""
        real = self.T if self.num_tokens is None else self.num_tokens
        return np.array(np.broadcast_to(real, (self.B,)), np.int32)


def make_inputs(spec: RopeWriteSpec, key: jax.Array) -> tuple[jax.Array, ...]:
    """Random inputs in the order of the call: filled pools and a shuffled page table."""
    B, T, H = spec.B, spec.T, spec.H
    pages_per_row = -(-(int(spec.starts.max()) + T) // spec.page_size)
    num_pages = B * pages_per_row
    keys = jax.random.split(key, 7)
    dtype = jnp.dtype(spec.dtype)
    pool = (num_pages, spec.K, spec.page_size, H)
    angles = jax.random.uniform(keys[3], (B, T, H // 2), maxval=2 * jnp.pi)
    table = jax.random.permutation(keys[6], num_pages).reshape(B, pages_per_row)
    return (
        jax.random.normal(keys[0], (B, T, spec.N, H), dtype),
        jax.random.normal(keys[1], (B, T, spec.K, H), dtype),
        jax.random.normal(keys[2], (B, T, spec.K, H), dtype),
        jnp.cos(angles),
        jnp.sin(angles),
        jax.random.normal(keys[4], pool, dtype),
        jax.random.normal(keys[5], pool, dtype),
        table.astype(jnp.int32),
        jnp.asarray(spec.starts),
        jnp.asarray(spec.counts),
    )


def count_bytes(spec: RopeWriteSpec) -> int:
    """Fewest bytes a call must move: q, k, v and angles in; q, k and new slots of pages out."""
    size = jnp.dtype(spec.dtype).itemsize
    tokens, written = spec.B * spec.T, int(spec.counts.sum())
    rotated = 2 * (spec.N + spec.K) * tokens
    values, slots = spec.K * tokens, 2 * spec.K * written
    return size * spec.H * (rotated + values + slots) + 4 * spec.H * tokens


def count_flops(spec: RopeWriteSpec) -> int:
    """Two products and a sum for each rotated element; far below the floor by bytes."""
    return 3 * spec.B * spec.T * (spec.N + spec.K) * spec.H


def _llama(B: int, T: int, start: int = 0) -> RopeWriteSpec:
    return RopeWriteSpec(model="llama-3-8b", B=B, T=T, N=32, K=8, H=128, start=start)


SPECS: tuple[RopeWriteSpec, ...] = (
    _llama(1, 1, 1023), _llama(8, 1, 1023), _llama(64, 1, 1023), _llama(1, 4096),
    RopeWriteSpec(model="smollm2-135m", B=8, T=1, N=9, K=3, H=64, start=1023),
    RopeWriteSpec(model="qwen2.5-0.5b", B=8, T=1, N=14, K=2, H=64, start=1023),
    RopeWriteSpec(model="gemma-3-270m", B=8, T=1, N=4, K=1, H=256, start=1023),
    RopeWriteSpec(model="ci", B=1, T=1, N=3, K=1, H=64, page_size=16, start=15, tag="ci"),
    RopeWriteSpec(model="ci", B=2, T=3, N=9, K=3, H=64, page_size=16, start=(0, 14), tag="ci"),
    RopeWriteSpec(model="ci", B=3, T=4, N=4, K=2, H=128, page_size=16, start=(3, 15, 16),
                  num_tokens=(4, 0, 2), tag="ci"),
    RopeWriteSpec(model="ci", B=2, T=2, N=4, K=1, H=256, page_size=32, start=31, tag="ci",
                  dtype="float16"),
    RopeWriteSpec(model="ci", B=1, T=2, N=14, K=2, H=64, page_size=128, start=127, tag="ci"),
)  # fmt: skip
