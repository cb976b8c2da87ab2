"""Named shapes of decode attention, shared by tests, benchmarks and tuning."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.pallas_kernels.decode_attention.config import key as tuning_key


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DecodeSpec:
    """One case of `decode_attention`.

    Attributes:
        model: Model whose head counts these are; first word of the case name.
        B: Requests.
        S: Longest length, tokens.
        N: Query heads.
        K: KV heads.
        H: Head dimension.
        T: Query tokens.
        page_size: p.
        dtype: Of query and pages.
        lengths: `"full"` (all S), `"ragged"` (lognormal, 100 … S), or explicit numbers.
        local_window_size: As in the op.
        logits_softcap: As in the op.
        tag: `"ci"` (seconds in the interpreter), `"primary"` (reported) or `"stress"`.
    """

    model: str
    B: int
    S: int
    N: int
    K: int
    H: int
    T: int = 1
    page_size: int = 64
    dtype: str = "bfloat16"
    lengths: Literal["full", "ragged"] | tuple[int, ...] = "full"
    local_window_size: int | None = None
    logits_softcap: float | None = None
    tag: Literal["ci", "primary", "stress"] = "primary"

    @property
    def name(self) -> str:
        """Case name in results: model shape first, lower case."""
        parts = [self.model, f"b{self.B}", f"s{self.S}"]
        parts += [f"t{self.T}"] if self.T > 1 else []
        parts += ["ragged"] if self.lengths != "full" else []
        parts += [f"p{self.page_size}"] if self.page_size != 64 else []
        parts += [f"w{self.local_window_size}"] if self.local_window_size is not None else []
        parts += ["softcap"] if self.logits_softcap is not None else []
        return " ".join(parts)

    @property
    def tuning_key(self) -> str:
        """Name of the call in tuning data; only of one query token, and sizes that are measured."""
        return tuning_key(
            B=self.B, S=self.S, N=self.N, K=self.K, H=self.H, page_size=self.page_size,
            left_window=self.local_window_size,
        )  # fmt: skip

    def row_lengths(self, seed: int = 0) -> np.ndarray:
        """`[B]` int32 lengths of the requests."""
        if isinstance(self.lengths, tuple):
            return np.asarray(self.lengths, np.int32)
        if self.lengths == "full":
            return np.full((self.B,), self.S, np.int32)
        drawn = np.random.default_rng(seed).lognormal(np.log(2000.0), 1.2, self.B)
        return np.clip(drawn, 100, self.S).astype(np.int32)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the call."""
        return {"local_window_size": self.local_window_size, "logits_softcap": self.logits_softcap}


def make_inputs(spec: DecodeSpec, key: jax.Array) -> tuple[jax.Array, ...]:
    """Random query, pages, a shuffled page table and lengths, in the order of the call."""
    pages_per_row = -(-spec.S // spec.page_size)
    num_pages = spec.B * pages_per_row
    keys = jax.random.split(key, 4)
    dtype = jnp.dtype(spec.dtype)
    pool = (num_pages, spec.K, spec.page_size, spec.H)
    table = jax.random.permutation(keys[3], num_pages).reshape(spec.B, pages_per_row)
    return (
        jax.random.normal(keys[0], (spec.B, spec.T, spec.N, spec.H), dtype),
        jax.random.normal(keys[1], pool, dtype),
        jax.random.normal(keys[2], pool, dtype),
        table.astype(jnp.int32),
        jnp.asarray(spec.row_lengths()),
    )


def visible_keys(spec: DecodeSpec) -> int:
    """Keys that must be read, summed over the requests."""
    lengths = spec.row_lengths().astype(np.int64)
    if spec.local_window_size is not None:
        lengths = np.minimum(lengths, spec.local_window_size + spec.T)
    return int(lengths.sum())


def count_bytes(spec: DecodeSpec) -> int:
    """Fewest bytes a call must move: visible keys and values, query in, output out."""
    size = jnp.dtype(spec.dtype).itemsize
    kv = 2 * visible_keys(spec) * spec.K * spec.H
    return size * (kv + 2 * spec.B * spec.T * spec.N * spec.H)


def count_flops(spec: DecodeSpec) -> int:
    """Multiply-adds of both products over the visible pairs of query and key, times two."""
    seen = spec.row_lengths()[:, None] - np.arange(spec.T, dtype=np.int64)
    if spec.local_window_size is not None:
        seen = np.minimum(seen, spec.local_window_size + 1)
    return 4 * int(np.maximum(seen, 0).sum()) * spec.N * spec.H


def _anchor(B: int, S: int) -> DecodeSpec:
    return DecodeSpec(model="llama-3-8b", B=B, S=S, N=32, K=8, H=128)


SPECS: tuple[DecodeSpec, ...] = (
    _anchor(1, 1024), _anchor(8, 1024), _anchor(64, 1024),
    _anchor(1, 4096), _anchor(1, 32768), _anchor(1, 131072),
    _anchor(16, 4096), _anchor(64, 4096), _anchor(16, 32768),
    DecodeSpec(model="llama-3-8b", B=16, S=32768, N=32, K=8, H=128, lengths="ragged"),
    DecodeSpec(model="llama-3-8b", B=64, S=32768, N=32, K=8, H=128, lengths="ragged"),
    DecodeSpec(model="llama-2-7b", B=1, S=1024, N=32, K=32, H=128),
    DecodeSpec(model="smollm2-135m", B=8, S=2048, N=9, K=3, H=64),
    DecodeSpec(model="qwen2.5-0.5b", B=8, S=16384, N=14, K=2, H=64),
    DecodeSpec(model="gemma-3-270m", B=8, S=8192, N=4, K=1, H=256),
    DecodeSpec(model="gemma-3-270m", B=8, S=8192, N=4, K=1, H=256, local_window_size=511),
    DecodeSpec(model="ci", B=1, S=128, N=4, K=2, H=64, lengths=(100,), tag="ci"),
    DecodeSpec(model="ci", B=3, S=192, N=6, K=2, H=64, lengths=(100, 0, 190), tag="ci"),
    DecodeSpec(model="ci", B=2, S=128, N=8, K=1, H=128, page_size=16, lengths=(100, 5), tag="ci"),
    DecodeSpec(model="ci", B=2, S=256, N=4, K=4, H=64, page_size=128, lengths=(1, 255), tag="ci",
               dtype="float16"),
    DecodeSpec(model="ci", B=2, S=96, N=4, K=1, H=256, page_size=32, lengths=(96, 33), tag="ci"),
    DecodeSpec(model="ci", B=3, S=192, N=4, K=2, H=64, T=2, page_size=32, lengths=(100, 2, 190),
               local_window_size=50, logits_softcap=30.0, tag="ci"),
    DecodeSpec(model="ci", B=2, S=192, N=14, K=2, H=64, T=8, lengths=(8, 150), tag="ci"),
)  # fmt: skip
