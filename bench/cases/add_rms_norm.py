"""Residual add and RMSNorm."""

import functools

from bench.case import Implementation, OpCase
from jaxinfer.pallas_kernels.add_rms_norm import specs
from jaxinfer.pallas_kernels.add_rms_norm.api import add_rms_norm
from jaxinfer.pallas_kernels.add_rms_norm.reference import add_rms_norm_reference
from jaxinfer.pallas_kernels.add_rms_norm.specs import SPECS, NormSpec

_EPS = 1e-5


def cases() -> list[OpCase]:
    """Every spec."""
    return [_case(spec) for spec in SPECS]


def _case(spec: NormSpec) -> OpCase:
    def ours(name: str | None) -> Implementation:
        return Implementation(call=functools.partial(add_rms_norm, eps=_EPS, implementation=name))

    return OpCase.of(
        "add_rms_norm",
        specs,
        spec,
        reference=functools.partial(add_rms_norm_reference, eps=_EPS),
        table={"dispatch": ours(None), "mosaic": ours("mosaic"), "xla": ours("xla")},
    )
