"""Products of few tokens with large weights."""

import functools

from bench.case import Implementation, OpCase
from jaxinfer.pallas_kernels.device import current_device
from jaxinfer.pallas_kernels.dispatch import NotSupported
from jaxinfer.pallas_kernels.matmul import specs
from jaxinfer.pallas_kernels.matmul.api import matmul
from jaxinfer.pallas_kernels.matmul.config import deepest
from jaxinfer.pallas_kernels.matmul.mosaic_sm90 import Config
from jaxinfer.pallas_kernels.matmul.reference import matmul_reference
from jaxinfer.pallas_kernels.matmul.specs import SPECS, MatmulSpec

# Tilings that compete in tuning: (block_n, block_k, cluster) by name.
TILINGS = {
    f"mosaic-n{n}-k{k}-c{c}": (n, k, c)
    for n, k, c in ((128, 64, 1), (128, 64, 2), (64, 128, 1), (64, 128, 2))
}


def cases() -> list[OpCase]:
    """Every spec."""
    return [_case(spec) for spec in SPECS]


def tiling(spec: MatmulSpec, name: str) -> Config | None:
    """The tiling of a name in `TILINGS` for a spec, on this device."""
    block_n, block_k, cluster = TILINGS[name]
    rows, banks = -(-spec.M // 8) * 8, 1 if spec.gate is None else 2
    return deepest(
        current_device(), block_n=block_n, block_k=block_k, cluster=cluster, rows=rows, banks=banks
    )


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
