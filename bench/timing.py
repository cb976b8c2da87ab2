"""Time of an implementation's calls on the device, each with a cold L2.

The end-to-end benchmarks count everything; `jaxinfer.pallas_kernels.timing` says what counts here.
"""

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Mapping
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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Compiled:
    """An implementation that can be called.

    Attributes:
        call: The compiled function.
        seconds: Tracing, lowering and compiling.
        note: What `note` returned right after tracing.
    """

    call: Callable[..., Any]
    seconds: float
    note: Any = None


def compile_all(
    implementations: Mapping[str, Implementation],
    inputs: Callable[[Implementation], Arrays],
    note: Callable[[], Any] = lambda: None,
) -> dict[str, Compiled | Exception]:
    """Compile several at once, in threads: that is most of the time which a benchmark takes.

    Args:
        implementations: By name.
        inputs: Gives the arrays of one, or their shapes.
        note: Called after the tracing of each; for what the next one's tracing overwrites.

    Returns:
        What can be called, by name; the exception where one cannot be compiled.
    """
    found: dict[str, Compiled | Exception] = {}
    waiting: dict[str, tuple[concurrent.futures.Future[Any], float, Any]] = {}

    def finish(lowered: jax.stages.Lowered) -> tuple[Any, float]:
        start = time.perf_counter()
        return lowered.compile(), time.perf_counter() - start

    with concurrent.futures.ThreadPoolExecutor(max_workers=8) as pool:
        for name, one in implementations.items():
            start = time.perf_counter()
            try:
                # A new function: what JAX has traced before, it would not trace (and choose) again.
                function = jax.jit(lambda *a, one=one: one.call(*a), donate_argnums=one.donate)
                lowered = function.lower(*inputs(one))
            except Exception as error:  # reported with its name when its turn comes
                found[name] = error
                continue
            seconds = time.perf_counter() - start
            waiting[name] = pool.submit(finish, lowered), seconds, note()
        for name, (future, seconds, noted) in waiting.items():
            try:
                call, more = future.result()
            except Exception as error:
                found[name] = error
            else:
                found[name] = Compiled(call=call, seconds=seconds + more, note=noted)
    return found


def time_calls(
    implementation: Implementation, compiled: Compiled, inputs: Arrays, *, repeats: int
) -> Timing:
    """Call once for the result, then time `repeats` calls."""
    raw = jax.block_until_ready(compiled.call(*inputs))
    result = implementation.result(raw)
    if implementation.donate:  # the next call overwrites it
        result = jax.tree.map(np.array, result)
    caller = _Caller(compiled.call, implementation.renew, implementation.renew(inputs, raw))
    del raw, inputs
    times = call_times(caller, repeats, flush=True)
    return Timing(times_us=times, compile_s=compiled.seconds, result=result)


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
