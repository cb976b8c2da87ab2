"""How the products of a model are measured."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from jaxinfer.autotune.op import Op
from jaxinfer.autotune.products import products
from jaxinfer.models.config import DecoderConfig
from jaxinfer.pallas_kernels.device import DeviceSpec
from jaxinfer.pallas_kernels.matmul import config as configs
from jaxinfer.pallas_kernels.matmul.api import matmul
from jaxinfer.pallas_kernels.matmul.reference import matmul_reference
from jaxinfer.pallas_kernels.matmul.shape import Config
from jaxinfer.pallas_kernels.matmul.specs import MatmulSpec, make_inputs


class Matmul(Op[MatmulSpec, Config]):
    """`matmul`: the weight is read from memory, since the L2 cache is flushed between calls."""

    name, unit = "matmul", "products"
    # To compile one took 0.4 to 0.75 s on a machine with an H100 (`compile_s` in bench/results);
    # the rest is for inputs and timing.
    seconds = 1.0

    def specs(self, config: DecoderConfig, *, model: str, dtype: str) -> list[MatmulSpec]:
        """The products of a layer and the output head, at every number of tokens measured."""
        return products(config, name=model, dtype=dtype)

    def least_gain_us(self, spec: MatmulSpec) -> float:
        """See `config.least_gain_us`."""
        return configs.least_gain_us(K=spec.K, N=spec.N)

    def candidates(self, device: DeviceSpec, spec: MatmulSpec) -> list[Config]:
        """See `config.candidates`."""
        return configs.candidates(device, **_sizes(spec))

    def heuristic(self, device: DeviceSpec, spec: MatmulSpec) -> Config | None:
        """See `config.heuristic`."""
        choice = configs.heuristic(device, **_sizes(spec), transposed=spec.transposed)
        return choice.config if choice.order[0] == "mosaic" else None

    def make_inputs(self, spec: MatmulSpec, key: jax.Array) -> tuple[jax.Array | None, ...]:
        """Tokens, weight and bias; a residual would be the same work for both."""
        return make_inputs(spec, key)[:3]

    def call(self, spec: MatmulSpec, **options: Any) -> Callable[..., jax.Array]:
        """The product."""
        return functools.partial(matmul, **_options(spec), out_dtype=spec.out_dtype, **options)

    def reference(self, spec: MatmulSpec) -> Callable[..., Any]:
        """The product in float32."""
        return functools.partial(matmul_reference, **_options(spec))

    def sizes(self, spec: MatmulSpec) -> dict[str, Any]:
        """Which projection, and its sizes."""
        return {"part": spec.part, "M": spec.M, "K": spec.K, "N": spec.N}


def _sizes(spec: MatmulSpec) -> dict[str, Any]:
    gated = spec.gate is not None
    return {"M": spec.M, "K": spec.K, "N": spec.N, "gated": gated, "cast": spec.cast}


def _options(spec: MatmulSpec) -> dict[str, Any]:
    return {"transposed": spec.transposed, "gate": spec.gate}
