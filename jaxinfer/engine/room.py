"""Whether the device holds a KV cache of the size that was asked for."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import psutil

from jaxinfer.engine.config import EngineConfig
from jaxinfer.errors import KVCacheFullError
from jaxinfer.models.config import DecoderConfig


@contextlib.contextmanager
def room_for(
    sizes: EngineConfig,
    model: DecoderConfig,
    devices: Sequence[Any] | None = None,
    *,
    shares: int = 1,
) -> Iterator[None]:
    """Make an engine inside; where its cache does not fit, the error names the option.

    What is hopeless is refused before: the list of free pages alone could take all memory.

    Args:
        sizes: Of the engine.
        model: The shape that each device computes.
        devices: Those that do; default: the one that arrays are put on by default.
        shares: Devices that share the tokens of a page.

    Raises:
        KVCacheFullError: the pages do not fit.
    """
    slots = sizes.page_size // shares
    per_page = 2 * model.num_layers * slots * model.num_kv_heads * model.head_dim
    needed = per_page * jax.numpy.dtype(sizes.dtype).itemsize * sizes.num_pages
    on_cpu = jax.default_backend() == "cpu"
    there = _memory_bytes(jax.local_devices()[:1] if devices is None else devices)
    options = "num_gpu_blocks_override" + ("" if on_cpu else " or gpu_memory_utilization")
    known = "" if there is None else f", and {there / 1e9:.1f} GB are there"
    wrong = KVCacheFullError(
        f"a KV cache of {sizes.num_pages} pages of {sizes.page_size} tokens takes "
        f"{needed / 1e9:.1f} GB{known}; lower {options}"
    )
    if there is not None and needed > there:
        raise wrong
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise wrong from error


def free_memory() -> int:
    """Memory of this machine that programs can have without swapping, bytes."""
    return psutil.virtual_memory().available


def _memory_bytes(devices: Sequence[Any]) -> int | None:
    """Free memory of the fullest device, if all tell.

    Where a CPU has less than the cache needs, Linux does not refuse, it ends the process later.
    Devices of a CPU are divisions of one memory.
    """
    if jax.default_backend() == "cpu":
        return free_memory() // len(devices)
    stats = [device.memory_stats() or {} for device in devices]
    if not all("bytes_limit" in known for known in stats):
        return None
    return min(known["bytes_limit"] - known["bytes_in_use"] for known in stats)
