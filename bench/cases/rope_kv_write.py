"""Rotation and cache write; the pools are donated, as in the engine."""

import functools

from bench.case import Arrays, Implementation, OpCase
from jaxinfer.pallas_kernels.rope_kv_write import specs
from jaxinfer.pallas_kernels.rope_kv_write.api import rope_kv_write
from jaxinfer.pallas_kernels.rope_kv_write.specs import SPECS, RopeWriteSpec

_POOLS = (5, 6)


def cases() -> list[OpCase]:
    """Every spec; there is no peer with this fusion in JAX."""
    return [_case(spec) for spec in SPECS]


def _case(spec: RopeWriteSpec) -> OpCase:
    def ours(name: str | None) -> Implementation:
        call = functools.partial(rope_kv_write, implementation=name)
        return Implementation(call=call, prepare=_copy, donate=_POOLS, renew=_renew)

    return OpCase.of(
        "rope_kv_write",
        specs,
        spec,
        reference=_reference,
        table={"dispatch": ours(None), "mosaic": ours("mosaic"), "xla": ours("xla")},
    )


def _reference(*arrays):
    """Plain JAX in float32: the op's own oracle goes token by token."""
    wide = (x.astype("float32") if i < _POOLS[-1] + 1 else x for i, x in enumerate(arrays))
    return rope_kv_write(*wide, implementation="xla")


def _copy(*arrays) -> Arrays:
    """The same arrays, with pools that may be overwritten."""
    return tuple(x.copy() if i in _POOLS else x for i, x in enumerate(arrays))


def _renew(arrays: Arrays, result) -> Arrays:
    return *arrays[: _POOLS[0]], *result[2:], *arrays[_POOLS[-1] + 1 :]
