"""Time of an implementation's calls on the device, each with a cold L2.

The end-to-end benchmarks count everything; `jaxinfer.pallas_kernels.timing` says what counts here.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from bench.case import Arrays, Implementation
from jaxinfer.pallas_kernels.timing import call_times


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Times of one function.

    Attributes:
        times_us: Of every call, µs.
        compile_s: Tracing, lowering and compiling, s.
        result: Of the first call.
    """

    times_us: list[float]
    compile_s: float
    result: Any


def time_calls(implementation: Implementation, inputs: Arrays, *, repeats: int) -> Timing:
    """Compile, call once for the result, then time `repeats` calls."""
    function = jax.jit(implementation.call, donate_argnums=implementation.donate)
    start = time.perf_counter()
    compiled = function.lower(*inputs).compile()
    compile_s = time.perf_counter() - start
    raw = jax.block_until_ready(compiled(*inputs))
    result = implementation.result(raw)
    if implementation.donate:  # the next call overwrites it
        result = jax.tree.map(np.array, result)
    caller = _Caller(compiled, implementation.renew, implementation.renew(inputs, raw))
    del raw, inputs
    times = call_times(caller, repeats, flush=True)
    return Timing(times_us=times, compile_s=compile_s, result=result)


@dataclasses.dataclass
class _Caller:
    """A compiled function with the arguments of its next call."""

    compiled: Callable[..., Any]
    renew: Callable[[Arrays, Any], Arrays]
    inputs: Arrays

    def __call__(self) -> Any:
        result = self.compiled(*self.inputs)
        self.inputs = self.renew(self.inputs, result)
        return result
