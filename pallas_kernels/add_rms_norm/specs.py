"""Named shapes of `add_rms_norm`, shared by tests and benchmarks."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NormSpec:
    """One case of `add_rms_norm`.

    Attributes:
        model: Model whose width this is; first word of the case name.
        M: Rows.
        D: Width.
        residual: Whether there is a residual to add.
        dtype: Of x and residual.
        tag: `"ci"` (seconds in the interpreter), `"primary"` (reported) or `"stress"`.
    """

    model: str
    M: int
    D: int
    residual: bool = True
    dtype: str = "bfloat16"
    tag: Literal["ci", "primary", "stress"] = "primary"

    @property
    def name(self) -> str:
        """Case name in results: model shape first, lower case."""
        return f"{self.model} m{self.M} d{self.D}" + ("" if self.residual else " plain")


def make_inputs(spec: NormSpec, key: jax.Array) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Random x, residual and weight, in the order of the call."""
    keys = jax.random.split(key, 3)
    shape, dtype = (spec.M, spec.D), jnp.dtype(spec.dtype)
    x = jax.random.normal(keys[0], shape, dtype)
    residual = jax.random.normal(keys[1], shape, dtype) if spec.residual else None
    return x, residual, 1 + 0.1 * jax.random.normal(keys[2], (spec.D,), dtype)


def count_bytes(spec: NormSpec) -> int:
    """Fewest bytes a call must move: everything read and written once."""
    arrays = 4 if spec.residual else 2
    return jnp.dtype(spec.dtype).itemsize * spec.D * (arrays * spec.M + 1)


def count_flops(spec: NormSpec) -> int:
    """Additions and multiplications; far below the floor by bytes."""
    return (5 if spec.residual else 4) * spec.M * spec.D


SPECS: tuple[NormSpec, ...] = (
    NormSpec(model="llama-3-8b", M=1, D=4096),
    NormSpec(model="llama-3-8b", M=8, D=4096),
    NormSpec(model="llama-3-8b", M=64, D=4096),
    NormSpec(model="llama-3-8b", M=4096, D=4096),
    NormSpec(model="gemma-3-270m", M=8, D=640, residual=False),
    NormSpec(model="ci", M=1, D=128, tag="ci"),
    NormSpec(model="ci", M=3, D=640, tag="ci"),
    NormSpec(model="ci", M=2, D=896, residual=False, tag="ci"),
    NormSpec(model="ci", M=2, D=2048, dtype="float16", tag="ci"),
)
