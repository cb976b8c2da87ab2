"""Named shapes of dense attention, shared by tests and benchmarks."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSpec:
    """One case of `attention`.

    Attributes:
        model: Model whose head counts these are; first word of the case name.
        B: Requests.
        T: Query tokens.
        S: Keys; 0 means T.
        N: Query heads.
        K: KV heads.
        H: Head dimension.
        dtype: Of query, key and value.
        is_causal: As in the op.
        q_offset: Position of query token 0, per row; None: zero.
        query_lengths: Valid query tokens per row; None: all.
        key_lengths: Valid keys per row; None: all.
        local_window_size: As in the op.
        logits_softcap: As in the op.
        tag: `"ci"`, `"primary"` (reported) or `"stress"`.
    """

    model: str
    B: int
    T: int
    N: int
    K: int
    H: int
    S: int = 0
    dtype: str = "bfloat16"
    is_causal: bool = True
    q_offset: tuple[int, ...] | None = None
    query_lengths: tuple[int, ...] | None = None
    key_lengths: tuple[int, ...] | None = None
    local_window_size: int | tuple[int, int] | None = None
    logits_softcap: float | None = None
    tag: Literal["ci", "primary", "stress"] = "primary"

    @property
    def num_keys(self) -> int:
        """S."""
        return self.S or self.T

    @property
    def name(self) -> str:
        """Case name in results: model shape first, lower case."""
        parts = [self.model, f"b{self.B}", f"t{self.T}"]
        parts += [f"s{self.S}"] if self.S else []
        parts += ["causal"] if self.is_causal else ["full"]
        parts += ["offset"] if self.q_offset else []
        parts += ["ragged"] if self.query_lengths or self.key_lengths else []
        parts += ["window"] if self.local_window_size is not None else []
        parts += ["softcap"] if self.logits_softcap is not None else []
        parts += [self.dtype] if self.dtype != "bfloat16" else []
        return " ".join(parts)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the call."""

        def lengths(values: tuple[int, ...] | None) -> jax.Array | None:
            return None if values is None else jnp.asarray(values, jnp.int32)

        return {
            "is_causal": self.is_causal,
            "q_offset": lengths(self.q_offset),
            "query_seq_lengths": lengths(self.query_lengths),
            "key_value_seq_lengths": lengths(self.key_lengths),
            "local_window_size": self.local_window_size,
            "logits_softcap": self.logits_softcap,
        }


def make_inputs(spec: AttentionSpec, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Random query, key and value."""
    keys = jax.random.split(key, 3)
    kv_shape = (spec.B, spec.num_keys, spec.K, spec.H)
    return (
        jax.random.normal(keys[0], (spec.B, spec.T, spec.N, spec.H), spec.dtype),
        jax.random.normal(keys[1], kv_shape, spec.dtype),
        jax.random.normal(keys[2], kv_shape, spec.dtype),
    )


def _visible(spec: AttentionSpec) -> tuple[np.ndarray, np.ndarray]:
    """First key that each query sees and one past its last, `[B, T]`; equal where it sees none."""

    def per_row(values: tuple[int, ...] | None, default: int) -> np.ndarray:
        return np.array(values or (default,) * spec.B)[:, None]

    token = np.arange(spec.T)
    position = per_row(spec.q_offset, 0) + token
    window = spec.local_window_size
    left, right = (window, window) if window is None or isinstance(window, int) else window
    right = 0 if spec.is_causal else right
    first = 0 * position if left is None else np.maximum(position - left, 0)
    end = np.broadcast_to(per_row(spec.key_lengths, spec.num_keys), position.shape)
    if right is not None:
        end = np.minimum(end, position + right + 1)
    hidden = token >= per_row(spec.query_lengths, spec.T)
    return first, np.where(hidden, first, np.maximum(first, end))


def count_flops(spec: AttentionSpec) -> int:
    """Multiply-adds of both products over the visible pairs of query and key, times two."""
    first, end = _visible(spec)
    return 4 * spec.N * spec.H * int((end - first).sum())


def count_bytes(spec: AttentionSpec) -> int:
    """Fewest bytes a call must move: visible keys and values, queries in, all of the output out."""
    first, end = _visible(spec)
    seen = end > first  # the keys of a row's queries follow each other without a gap
    lowest = np.where(seen, first, spec.num_keys).min(axis=1)
    keys = np.maximum(np.where(seen, end, 0).max(axis=1) - lowest, 0).sum()
    rows = spec.N * (int(seen.sum()) + spec.B * spec.T) + 2 * spec.K * int(keys)
    return jnp.dtype(spec.dtype).itemsize * rows * spec.H


def _anchor(T: int) -> AttentionSpec:
    return AttentionSpec(model="llama-3-8b", B=1, T=T, N=32, K=8, H=128)


SPECS: tuple[AttentionSpec, ...] = (
    *(_anchor(T) for T in (1024, 4096, 8192, 16384, 32768)),
    AttentionSpec(model="smollm2-135m", B=1, T=2048, N=9, K=3, H=64),
    AttentionSpec(model="qwen2.5-0.5b", B=1, T=8192, N=14, K=2, H=64),
    AttentionSpec(model="gemma-3-270m", B=1, T=4096, N=4, K=1, H=256),
    AttentionSpec(model="gemma-3-270m", B=1, T=4096, N=4, K=1, H=256, local_window_size=(511, 0)),
    AttentionSpec(model="ci", B=1, T=63, N=4, K=2, H=64, tag="ci"),
    AttentionSpec(model="ci", B=2, T=1, S=33, N=9, K=3, H=64, is_causal=False, tag="ci"),
    AttentionSpec(model="ci", B=1, T=1000, N=2, K=1, H=64, tag="ci", dtype="float32"),
    AttentionSpec(model="ci", B=2, T=600, S=1300, N=4, K=2, H=32, q_offset=(700, 3), tag="ci",
                  dtype="float32"),
    AttentionSpec(model="ci", B=3, T=17, S=40, N=4, K=1, H=128, q_offset=(0, 5, 23),
                  query_lengths=(17, 0, 9), key_lengths=(17, 5, 32), tag="ci"),
    AttentionSpec(model="ci", B=2, T=100, N=4, K=2, H=64, local_window_size=7, tag="ci"),
    AttentionSpec(model="ci", B=2, T=100, N=4, K=2, H=64, local_window_size=(9, 4),
                  is_causal=False, logits_softcap=20.0, tag="ci", dtype="float16"),
)  # fmt: skip
