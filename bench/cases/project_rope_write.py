"""The projection to queries, keys and values with what follows it; pools are donated."""

import functools
from typing import Any

from bench.case import Implementation, OpCase
from bench.cases import pools
from jaxinfer.pallas_kernels.device import current_device
from jaxinfer.pallas_kernels.dispatch import NotSupported
from jaxinfer.pallas_kernels.matmul.rotation import Heads
from jaxinfer.pallas_kernels.rope_kv_write import projection_specs as specs
from jaxinfer.pallas_kernels.rope_kv_write.config import ONE_LAUNCH, one_launch_config
from jaxinfer.pallas_kernels.rope_kv_write.projection_specs import SPECS, ProjectSpec
from jaxinfer.pallas_kernels.rope_kv_write.with_projection import project_rope_write


def cases() -> list[OpCase]:
    """Every spec; there is no peer with this fusion in JAX."""
    return [_case(spec) for spec in SPECS]


def _case(spec: ProjectSpec) -> OpCase:
    def implementation(call) -> Implementation:
        call = functools.partial(call, num_heads=spec.N)
        return Implementation(call=call, prepare=pools.copy, donate=pools.POOLS, renew=pools.renew)

    def ours(name: str | None) -> Implementation:
        return implementation(functools.partial(project_rope_write, implementation=name))

    def tiled(name: str) -> Implementation:
        def call(*arrays, num_heads: int):
            heads, device = Heads(spec.N, spec.K, spec.H), current_device()
            config = one_launch_config(device, heads, M=spec.B, D=spec.D, tiling=name)
            if config is None:
                here = f"{spec.name} on {device.name!r}"
                raise NotSupported("project_rope_write", name, here, "other sizes, on Hopper")
            fixed = functools.partial(project_rope_write, implementation="mosaic", config=config)
            return fixed(*arrays, num_heads=num_heads)

        return implementation(call)

    return OpCase.of(
        "project_rope_write",
        specs,
        spec,
        reference=functools.partial(_reference, num_heads=spec.N),
        table={
            "dispatch": ours(None),
            "separate": ours("separate"),
            "xla": ours("xla"),
            **{f"mosaic-{name}": tiled(name) for name in ONE_LAUNCH},
        },
    )


def _reference(*arrays, num_heads: int):
    """Plain JAX in float32."""
    wide: Any = (x if x is None or x.dtype.kind in "iu" else x.astype("float32") for x in arrays)
    return project_rope_write(*wide, num_heads=num_heads, implementation="xla")
