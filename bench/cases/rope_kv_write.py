"""Rotation and cache write; the pools are donated, as in the engine."""

import functools

from bench.case import Implementation, OpCase
from bench.cases import pools
from jaxinfer.pallas_kernels.rope_kv_write import specs
from jaxinfer.pallas_kernels.rope_kv_write.api import rope_kv_write
from jaxinfer.pallas_kernels.rope_kv_write.specs import SPECS, RopeWriteSpec


def cases() -> list[OpCase]:
    """Every spec; there is no peer with this fusion in JAX."""
    return [_case(spec) for spec in SPECS]


def _case(spec: RopeWriteSpec) -> OpCase:
    def ours(name: str | None) -> Implementation:
        call = functools.partial(rope_kv_write, implementation=name)
        return Implementation(call=call, prepare=pools.copy, donate=pools.POOLS, renew=pools.renew)

    return OpCase.of(
        "rope_kv_write",
        specs,
        spec,
        reference=_reference,
        table={"dispatch": ours(None), "mosaic": ours("mosaic"), "xla": ours("xla")},
    )


def _reference(*arrays):
    """Plain JAX in float32: the op's own oracle goes token by token."""
    wide = (x.astype("float32") if i <= pools.POOLS[-1] else x for i, x in enumerate(arrays))
    return rope_kv_write(*wide, implementation="xla")
