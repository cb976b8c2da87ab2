"""Named shapes of flat products, shared by tests, benchmarks and tuning."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels.matmul.config import key as tuning_key
from jaxinfer.pallas_kernels.matmul.epilogue import Gate


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MatmulSpec:
    """One case of `matmul`.

    Attributes:
        model: Model whose shape this is; first word of the case name.
        M: Tokens.
        K: Depth.
        N: Columns of the weight, both halves of a gated one.
        part: Which projection of the model, or empty.
        gate: As in the op.
        bias: Whether there is a bias.
        residual: Whether there is a residual.
        transposed: As in the op.
        dtype: Of all arrays.
        cast: The result is float32.
        tag: `"ci"` (seconds in the interpreter), `"primary"` (reported) or `"stress"`.
    """

    model: str
    M: int
    K: int
    N: int
    part: str = ""
    gate: Gate | None = None
    bias: bool = False
    residual: bool = False
    transposed: bool = False
    dtype: str = "bfloat16"
    cast: bool = False
    tag: Literal["ci", "primary", "stress"] = "primary"

    @property
    def name(self) -> str:
        """Case name in results: model shape first, lower case."""
        parts = [self.model, *filter(None, [self.part]), f"m{self.M} k{self.K} n{self.N}"]
        parts += [self.gate] if self.gate else []
        parts += ["bias"] if self.bias else []
        parts += ["residual"] if self.residual else []
        parts += ["transposed"] if self.transposed else []
        parts += ["cast"] if self.cast else []
        parts += [self.dtype] if self.dtype != "bfloat16" else []
        return " ".join(parts)

    @property
    def tuning_key(self) -> str:
        """Name of the product in tuning data."""
        return tuning_key(
            M=self.M, K=self.K, N=self.N, gated=self.gate is not None, transposed=self.transposed,
            cast=self.cast,
        )  # fmt: skip

    @property
    def out_dtype(self) -> str:
        """Of the result."""
        return "float32" if self.cast else self.dtype


def make_inputs(
    spec: MatmulSpec, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """Random x, weight, bias and residual, as the call orders them; products of about unit size."""
    keys = jax.random.split(key, 4)
    dtype = jnp.dtype(spec.dtype)
    shape = (spec.N, spec.K) if spec.transposed else (spec.K, spec.N)
    weight = jax.random.normal(keys[1], shape, dtype) * jnp.asarray(spec.K**-0.5, dtype)
    bias = jax.random.normal(keys[2], (spec.N,), dtype) if spec.bias else None
    columns = spec.N // 2 if spec.gate else spec.N
    residual = jax.random.normal(keys[3], (spec.M, columns), dtype) if spec.residual else None
    return jax.random.normal(keys[0], (spec.M, spec.K), dtype), weight, bias, residual


def count_bytes(spec: MatmulSpec) -> int:
    """Fewest bytes a call must move: x, weight, bias and residual in, result out."""
    out = spec.M * (spec.N // 2 if spec.gate else spec.N)
    elements = spec.M * spec.K + spec.K * spec.N
    elements += (spec.N if spec.bias else 0) + (out if spec.residual else 0)
    results = jnp.dtype(spec.out_dtype).itemsize * out
    return jnp.dtype(spec.dtype).itemsize * elements + results


def count_flops(spec: MatmulSpec) -> int:
    """Multiply-adds of the product, times two."""
    return 2 * spec.M * spec.K * spec.N


def _layer(
    model: str, M: int, *, D: int, heads: int, qkv: int, F: int, bias: bool = False,
    tag: Literal["primary", "stress"] = "primary",
) -> tuple[MatmulSpec, ...]:  # fmt: skip
    """The four products of a layer.

    Args:
        model: First word of the names.
        M: Tokens.
        D: Width of the stream.
        heads: Columns of all query heads.
        qkv: Columns of query, key and value heads.
        F: Width of the feed-forward.
        bias: Whether queries, keys and values have biases.
        tag: As in `MatmulSpec`.
    """
    of = functools.partial(MatmulSpec, model=model, M=M, tag=tag)
    return (
        of(part="qkv", K=D, N=qkv, bias=bias),
        of(part="o", K=heads, N=D),
        of(part="gate_up", K=D, N=2 * F, gate="silu"),
        of(part="down", K=F, N=D),
    )


_LLAMA_3_8B = functools.partial(_layer, "llama-3-8b", D=4096, heads=4096, qkv=6144, F=14_336)
_SMOLLM2 = functools.partial(_layer, "smollm2-135m", D=576, heads=576, qkv=960, F=1536)
_OTHERS = (
    functools.partial(_layer, "llama-2-7b", D=4096, heads=4096, qkv=12_288, F=11_008),
    functools.partial(_layer, "qwen2.5-7b", D=3584, heads=3584, qkv=4608, F=18_944, bias=True),
    # One device's part of eight.
    functools.partial(_layer, "llama-3-70b/8", D=8192, heads=1024, qkv=1280, F=3584),
)

SPECS: tuple[MatmulSpec, ...] = (
    *(spec for M in (1, 8, 16, 32, 64, 128) for spec in _LLAMA_3_8B(M)),
    *(spec for M in (1, 8, 64) for spec in _SMOLLM2(M)),
    *(spec for of in _OTHERS for M in (1, 8, 64) for spec in of(M, tag="stress")),
    *(
        # The output head, of tied weights as they lie in the table of embeddings.
        MatmulSpec(model=model, part="head", M=M, K=K, N=N, transposed=tied, cast=True)
        for model, K, N, tied in (
            ("llama-3-8b", 4096, 128_256, False),
            ("smollm2-135m", 576, 49_152, True),
            ("gemma-3-270m", 640, 262_144, True),
        )
        for M in (1, 8, 64)
    ),
    MatmulSpec(model="ci", M=8, K=128, N=128, tag="ci"),
    MatmulSpec(model="ci", M=1, K=192, N=192, bias=True, tag="ci"),
    MatmulSpec(model="ci", M=3, K=128, N=256, gate="silu", tag="ci"),
    MatmulSpec(model="ci", M=5, K=128, N=192, residual=True, tag="ci"),
    MatmulSpec(model="ci", M=12, K=64, N=256, gate="silu", bias=True, residual=True, tag="ci"),
    MatmulSpec(model="ci", M=17, K=128, N=384, gate="gelu_tanh", bias=True, tag="ci"),
    MatmulSpec(model="ci", M=16, K=256, N=320, transposed=True, dtype="float16", tag="ci"),
    MatmulSpec(model="ci", M=3, K=128, N=192, transposed=True, cast=True, tag="ci"),
    MatmulSpec(model="ci", M=9, K=128, N=256, gate="silu", cast=True, tag="ci"),
)
