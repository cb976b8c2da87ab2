"""The clock on a CPU; and how kernels are summed, with made-up kernels."""

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.pallas_kernels import timing
from jaxinfer.pallas_kernels.device import CPU, H100, use_device


def test_on_a_cpu_the_wall_clock_is_read():
    with use_device(CPU):
        times = timing.call_times(lambda: jnp.ones(3), 5, flush=True)
    assert len(times) == 5
    assert min(times) > 0


@pytest.fixture
def kernels(monkeypatch):
    """A clock that reads made-up kernels: for the read between calls, then for all calls."""
    monkeypatch.setattr(timing, "COLD_BYTES", 16)

    def read(*answers, flush=True):
        left = list(answers)

        def fake(run):
            jax.block_until_ready(run())
            return left.pop(0)

        monkeypatch.setattr(timing, "_kernels", fake)
        with use_device(H100):
            return timing.call_times(lambda: jnp.ones(()), 2, flush=flush)

    return read


FLUSH = [("flush", 1.0)]


def test_kernels_of_a_call_are_summed_without_those_between(kernels):
    calls = [*FLUSH, ("a", 0.002), ("b", 0.003), *FLUSH, ("a", 0.004), ("b", 0.005)]
    assert kernels(FLUSH, calls) == pytest.approx([5.0, 9.0])


def test_nothing_is_read_between_calls_whose_inputs_change(kernels):
    assert kernels([("a", 0.002), ("a", 0.004)], flush=False) == pytest.approx([2.0, 4.0])


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([*FLUSH, ("a", 1.0), *FLUSH], "3 kernels in 2 calls"),
        ([*FLUSH, *FLUSH], "2 kernels in 2 calls"),
        ([*FLUSH, ("a", 1.0), *FLUSH, ("b", 1.0)], "another order"),
    ],
)
def test_kernels_that_cannot_be_told_apart_are_an_error(kernels, calls, message):
    with pytest.raises(RuntimeError, match=message):
        kernels(FLUSH, calls)
