"""Time of a call on the device: the sum of its kernels, read by CUPTI.

Gaps between a call's kernels are not counted, nor is the launch from the host. On a CPU the wall
clock is read.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels.device import current_device

COLD_BYTES = 1 << 27  # read between two uses, they leave nothing: twice the L2 of an H100 or H200


def call_times(call: Callable[[], Any], repeats: int, *, flush: bool) -> list[float]:
    """Times of `repeats` calls, µs.

    Args:
        call: Starts the same kernels each time; already compiled.
        repeats: Timed calls; two more come before them.
        flush: Read `COLD_BYTES` between calls, so that no call finds its inputs in the L2 cache.
            Not needed where inputs change from call to call and are as many bytes together.

    Raises:
        RuntimeError: kernels of the calls cannot be told apart.
    """
    on_gpu = current_device().platform == "gpu"
    return _kernel_times(call, repeats, flush=flush) if on_gpu else _wall_times(call, repeats)


def _wall_times(call: Callable[[], Any], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append((time.perf_counter() - start) * 1e6)
    return times


def _kernel_times(call: Callable[[], Any], repeats: int, *, flush: bool) -> list[float]:
    """Per call, the sum of the times of its kernels, µs."""
    evict = _reader() if flush else lambda: None

    def calls(count: int) -> Any:
        result = None
        for _ in range(count):
            evict()
            result = call()
        return result

    jax.block_until_ready(calls(2))  # CUDA graphs are recorded after the first run
    between = len(_kernels(evict)) if flush else 0

    timings = _kernels(lambda: calls(repeats))
    each, rest = divmod(len(timings), repeats)
    if rest or each <= between:
        raise RuntimeError(f"{len(timings)} kernels in {repeats} calls, {between} between calls")
    groups = [timings[i * each : (i + 1) * each] for i in range(repeats)]
    names = [[name for name, _ in group] for group in groups]
    if any(other != names[0] for other in names):
        raise RuntimeError("kernels ran in another order from call to call")
    return [1e3 * sum(ms for _, ms in group[between:]) for group in groups]


@functools.cache
def _reader() -> Callable[[], Any]:
    """Reads `COLD_BYTES` of its own, which stay."""
    buffer = jnp.ones((COLD_BYTES,), jnp.int8)
    read = jax.jit(lambda x: x.astype(jnp.int32).sum()).lower(buffer).compile()
    return lambda: read(buffer)


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
