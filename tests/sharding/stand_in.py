"""`jax.experimental.thunky` of JAX 0.12 for CPUs: as much of it as `collective_group` takes."""

import sys
import types

import jax
import pytest
from jax import lax

from jaxinfer.pallas_kernels import device


def jit(function):
    """Arrays come as references, as there."""

    def called(*args):
        function(*(x if isinstance(x, jax.Ref) else jax.new_ref(x) for x in args))

    return called


def collective_permute(source, target, axis_name, source_target_pairs):
    target[...] = lax.ppermute(source[...], axis_name, source_target_pairs)


def collective_group(function):
    function()


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the module be found, and the device be a GPU to those who ask for it."""
    monkeypatch.setitem(
        sys.modules,
        "jax.experimental.thunky",
        types.SimpleNamespace(
            jit=jit, collective_permute=collective_permute, collective_group=collective_group
        ),
    )
    monkeypatch.setattr(
        "jaxinfer.sharding.sequence_parallel.exchange.current_device", lambda: device.H100
    )
