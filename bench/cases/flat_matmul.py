"""Products of few tokens with large weights."""

import dataclasses
import functools
from typing import Any

from bench.case import Implementation, OpCase
from jaxinfer.pallas_kernels.device import current_device
from jaxinfer.pallas_kernels.dispatch import NotSupported
from jaxinfer.pallas_kernels.matmul import specs
from jaxinfer.pallas_kernels.matmul.api import matmul
from jaxinfer.pallas_kernels.matmul.config import GRID, Tiling, fit
from jaxinfer.pallas_kernels.matmul.reference import matmul_reference
from jaxinfer.pallas_kernels.matmul.shape import Config
from jaxinfer.pallas_kernels.matmul.specs import SPECS, MatmulSpec

# Tilings that compete in tuning, by name.
TILINGS = {f"mosaic-{tiling.name}": tiling for tiling in GRID}


def cases() -> list[OpCase]:
    """Every spec."""
    return [_case(spec) for spec in SPECS]


def tiling(spec: MatmulSpec, name: str) -> Config | None:
    """The tiling of a name in `TILINGS` for a spec, on this device; None if it does not suit."""

    def of(tiling: Tiling) -> Config | None:
        return fit(
            current_device(), tiling, M=spec.M, K=spec.K, N=spec.N, gated=spec.gate is not None,
            cast=spec.cast,
        )  # fmt: skip

    wanted = TILINGS[name]
    config = of(wanted)
    # A bound on the ring that changes nothing is no other tiling.
    if wanted.ring_kib and config == of(dataclasses.replace(wanted, ring_kib=0)):
        return None
    return config


def _case(spec: MatmulSpec) -> OpCase:
    reference_options = {"transposed": spec.transposed, "gate": spec.gate}
    options: dict[str, Any] = reference_options | {"out_dtype": spec.out_dtype}

    def ours(name: str | None) -> Implementation:
        return Implementation(call=functools.partial(matmul, **options, implementation=name))

    def tiled(name: str) -> Implementation:
        def call(*arrays):
            config = tiling(spec, name)
            if config is None:
                raise NotSupported("matmul", name, f"the product {spec.name}", "other products")
            return matmul(*arrays, **options, implementation="mosaic", config=config)

        return Implementation(call=call)

    return OpCase.of(
        "matmul",
        specs,
        spec,
        reference=functools.partial(matmul_reference, **reference_options),
        table={
            "dispatch": ours(None),
            "mosaic": ours("mosaic"),
            "xla": ours("xla"),
            **{name: tiled(name) for name in TILINGS},
        },
    )
