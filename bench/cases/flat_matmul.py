"""Products of few tokens with large weights."""

import functools

from bench.case import Implementation, OpCase
from jaxinfer.pallas_kernels.device import current_device
from jaxinfer.pallas_kernels.dispatch import NotSupported
from jaxinfer.pallas_kernels.matmul import specs
from jaxinfer.pallas_kernels.matmul.api import matmul
from jaxinfer.pallas_kernels.matmul.config import GRID, deepest
from jaxinfer.pallas_kernels.matmul.mosaic_sm90 import Config
from jaxinfer.pallas_kernels.matmul.reference import matmul_reference
from jaxinfer.pallas_kernels.matmul.specs import SPECS, MatmulSpec

# Tilings that compete in tuning, by name: block_n, block_k, cluster.
TILINGS = {f"mosaic-n{n}-k{k}-c{cluster}": (n, k, cluster) for n, k, cluster in GRID}


def cases() -> list[OpCase]:
    """Every spec."""
    return [_case(spec) for spec in SPECS]


def tiling(spec: MatmulSpec, name: str) -> Config | None:
    """The tiling of a name in `TILINGS` for a spec, on this device."""
    block_n, block_k, cluster = TILINGS[name]
    return deepest(
        current_device(), block_n=block_n, block_k=block_k, cluster=cluster,
        M=spec.M, gated=spec.gate is not None,
    )  # fmt: skip


def _case(spec: MatmulSpec) -> OpCase:
    options = {"transposed": spec.transposed, "gate": spec.gate}

    def ours(name: str | None) -> Implementation:
        return Implementation(call=functools.partial(matmul, **options, implementation=name))

    def tiled(name: str) -> Implementation:
        def call(*arrays):
            config = tiling(spec, name)
            if config is None:
                raise NotSupported("matmul", name, f"{spec.M} tokens", "fewer")
            return matmul(*arrays, **options, implementation="mosaic", config=config)

        return Implementation(call=call)

    return OpCase.of(
        "matmul",
        specs,
        spec,
        reference=functools.partial(matmul_reference, **options),
        table={
            "dispatch": ours(None),
            "mosaic": ours("mosaic"),
            "xla": ours("xla"),
            **{name: tiled(name) for name in TILINGS},
        },
    )
