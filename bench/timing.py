"""Time of a call on the device: the sum of its kernels, read by CUPTI, with a cold L2.

Between calls a buffer of twice the L2 is read, so that no call finds its inputs in the cache.
Gaps between a call's kernels are not counted; the end-to-end benchmarks count everything.
On a CPU the wall clock is read.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.case import Arrays, Implementation
from jaxinfer.pallas_kernels.device import current_device

_FLUSH_BYTES = 1 << 27  # more than twice the L2 of an H100 or H200


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
    on_gpu = current_device().platform == "gpu"
    times = _kernel_times(caller, repeats) if on_gpu else _wall_times(caller, repeats)
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


def _wall_times(call: _Caller, repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append((time.perf_counter() - start) * 1e6)
    return times


def _kernel_times(call: _Caller, repeats: int) -> list[float]:
    """Per call, the sum of the times of its kernels, µs."""
    buffer = jnp.ones((_FLUSH_BYTES,), jnp.int8)
    flush = jax.jit(lambda x: x.astype(jnp.int32).sum()).lower(buffer).compile()

    def calls(count: int) -> Any:
        result = None
        for _ in range(count):
            flush(buffer)
            result = call()
        return result

    jax.block_until_ready(calls(2))  # CUDA graphs are recorded after the first run
    between = len(_kernels(lambda: flush(buffer)))

    timings = _kernels(lambda: calls(repeats))
    each, rest = divmod(len(timings), repeats)
    if rest or each <= between:
        raise RuntimeError(f"{len(timings)} kernels in {repeats} calls, {between} between calls")
    groups = [timings[i * each : (i + 1) * each] for i in range(repeats)]
    names = [[name for name, _ in group] for group in groups]
    if any(other != names[0] for other in names):
        raise RuntimeError("kernels ran in another order from call to call")
    return [1e3 * sum(ms for _, ms in group[between:]) for group in groups]


def _kernels(run: Callable[[], Any]) -> list[tuple[str, float]]:
    """Names and times (ms) of the kernels that `run` starts, in order.

    `run` returns the last result, which is waited for.
    """
    # What jax.experimental.mosaic.gpu.profiler is made of; that repeats one call only.
    from jax._src.lib import mosaic_gpu

    cupti: Any = mosaic_gpu._mosaic_gpu_ext  # pyright: ignore[reportPrivateImportUsage]
    cupti._cupti_init()
    try:
        jax.block_until_ready(run())
    finally:
        timings = cupti._cupti_get_timings(True)
    return timings
