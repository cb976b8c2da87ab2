"""`collective_group`: what JAX 0.12 makes of it, and what is said where it is not to be had."""

import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from jaxinfer.pallas_kernels import NotSupported, force_implementation
from jaxinfer.pallas_kernels.device import CPU, H100, use_device
from jaxinfer.sharding import build, ring_attention
from tests.sharding import stand_in

THUNKY = "jax.experimental.thunky"
X = jax.ShapeDtypeStruct((1, 12, 2, 8), jnp.bfloat16)


def trace(n: int, schedule: str | None = None):
    """A call over n devices that need not be there."""

    def local(x):
        return ring_attention(
            x, x, x, axis_name="seq", transport="collective_group", schedule=schedule
        )

    mesh, spec = AbstractMesh((n,), ("seq",), (AxisType.Auto,)), P(None, "seq")
    call = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return jax.jit(call).trace(X)


def test_the_jax_that_is_needed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, THUNKY, None)
    with pytest.raises(NotSupported, match=rf"JAX {jax.__version__}; supported: JAX 0\.12"):
        trace(4)


def test_other_devices_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, THUNKY, stand_in)
    with use_device(CPU), pytest.raises(NotSupported, match="'cpu'; supported: NVIDIA GPUs"):
        trace(4)


@pytest.mark.parametrize("schedule", ["ring", "full_link"])
def test_a_step_is_one_group_of_permutes(schedule):
    """Traced and lowered for GPUs by the real module, which runs nowhere else."""
    pytest.importorskip(THUNKY, reason="JAX 0.12 or newer", exc_type=ImportError)
    n, steps = 4, build(schedule, 4).num_steps
    with use_device(H100), force_implementation("xla"):
        traced = trace(n, schedule)
        assert str(traced.jaxpr).count("thunky.collective_group[") == steps
        permutes = str(traced.jaxpr).count("thunky.collective_permute[")
        assert permutes == steps * build(schedule, n).num_lanes
        module = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert module.count("@thunky.inline_module(") == steps
    assert "collective_permute" not in module
