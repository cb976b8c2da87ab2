"""Named shapes of `project_rope_write`, shared by tests and benchmarks."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels.rope_kv_write import specs as rope_specs
from jaxinfer.pallas_kernels.rope_kv_write.specs import RopeWriteSpec


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ProjectSpec:
    """One case of `project_rope_write`: a decode step's tokens, one per request.

    Attributes:
        model: Model whose sizes these are; first word of the case name.
        B: Requests.
        D: Width of the model.
        N: Query heads.
        K: KV heads.
        H: Head dimension.
        bias: Whether the projection adds one.
        page_size: p.
        start: Position of every token.
        dtype: Of everything but angles and places.
        tag: `"ci"` (seconds in the interpreter) or `"primary"` (reported).
    """

    model: str
    B: int
    D: int
    N: int
    K: int
    H: int
    bias: bool = False
    page_size: int = 64
    start: int = 1023
    dtype: str = "bfloat16"
    tag: Literal["ci", "primary"] = "primary"

    @property
    def name(self) -> str:
        """Case name in results: model shape first, lower case."""
        return f"{self.model} b{self.B}"

    @property
    def columns(self) -> int:
        """Of the weight."""
        return (self.N + 2 * self.K) * self.H

    @property
    def written(self) -> RopeWriteSpec:
        """Rotation and cache write of these tokens."""
        return RopeWriteSpec(
            model=self.model, B=self.B, T=1, N=self.N, K=self.K, H=self.H,
            page_size=self.page_size, start=self.start, dtype=self.dtype,
        )  # fmt: skip


def make_inputs(spec: ProjectSpec, key: jax.Array) -> tuple[jax.Array | None, ...]:
    """Random inputs in the order of the call."""
    of_x, of_weight, of_bias, of_rest = jax.random.split(key, 4)
    dtype = jnp.dtype(spec.dtype)
    _, _, _, cos, sin, *rest = rope_specs.make_inputs(spec.written, of_rest)
    weight = jax.random.normal(of_weight, (spec.D, spec.columns), dtype)
    return (
        jax.random.normal(of_x, (spec.B, 1, spec.D), dtype),
        weight * spec.D**-0.5,
        jax.random.normal(of_bias, (spec.columns,), dtype) if spec.bias else None,
        cos,
        sin,
        *rest,
    )


def count_bytes(spec: ProjectSpec) -> int:
    """Fewest bytes a call must move: weight, bias, tokens, angles in; queries, new slots out."""
    size = jnp.dtype(spec.dtype).itemsize
    once = (spec.D + spec.bias) * spec.columns
    per_token = spec.D + spec.columns
    return size * (once + spec.B * per_token) + 4 * spec.H * spec.B


def count_flops(spec: ProjectSpec) -> int:
    """Of the product and of the rotation."""
    return 2 * spec.B * spec.D * spec.columns + rope_specs.count_flops(spec.written)


def _llama(B: int) -> ProjectSpec:
    return ProjectSpec(model="llama-3-8b", B=B, D=4096, N=32, K=8, H=128)


SPECS: tuple[ProjectSpec, ...] = (
    _llama(1), _llama(8), _llama(16), _llama(64),
    ProjectSpec(model="llama-2-7b", B=1, D=4096, N=32, K=32, H=128),
    ProjectSpec(model="smollm2-135m", B=8, D=576, N=9, K=3, H=64),
    ProjectSpec(model="smollm2-135m", B=64, D=576, N=9, K=3, H=64),
    ProjectSpec(model="qwen2.5-0.5b", B=8, D=896, N=14, K=2, H=64, bias=True),
    ProjectSpec(model="gemma-3-270m", B=8, D=640, N=4, K=1, H=256),
    ProjectSpec(model="ci", B=3, D=192, N=2, K=1, H=128, bias=True, page_size=16, start=15,
                tag="ci"),
    ProjectSpec(model="ci", B=2, D=512, N=1, K=1, H=64, page_size=16, start=31, tag="ci"),
)  # fmt: skip
