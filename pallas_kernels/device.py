"""What host code needs to know of a GPU, as a value that tests can inject."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator

import jax


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DeviceSpec:
    """A device as planners, heuristics and benchmarks see it.

    Attributes:
        platform: `"gpu"` (NVIDIA) or `"cpu"`.
        name: Marketing name, as the driver prints it.
        capability: CUDA compute capability times ten (90 for Hopper); 0 on a CPU.
        num_sms: Streaming multiprocessors (CPU: cores do not matter to our planners, 1).
        smem_bytes: Shared memory one block may use, bytes.
        l2_bytes: Last-level cache, bytes.
        read_gbps: Measured read bandwidth of device memory, GB/s (10^9 bytes); 0 if unknown.
        bf16_tflops: Measured dense bfloat16 rate of a large matrix product; 0 if unknown.
    """

    platform: str
    name: str
    capability: int = 0
    num_sms: int = 1
    smem_bytes: int = 0
    l2_bytes: int = 0
    read_gbps: float = 0.0
    bf16_tflops: float = 0.0

    @property
    def key(self) -> str:
        """Folder name for this device's tuning data and benchmark results."""
        return re.sub(r"[^a-z0-9]+", "_", self.name.lower()).strip("_")

    @property
    def is_hopper(self) -> bool:
        """Whether kernels written for sm_90a (wgmma, TMA) run on it."""
        return self.platform == "gpu" and self.capability == 90

    def floor_us(self, *, flops: float, bytes: float) -> float:
        """Lower bound on the time of an operation, µs; 0 where the ceilings are unknown."""
        compute = flops / (self.bf16_tflops * 1e6) if self.bf16_tflops else 0.0
        memory = bytes / (self.read_gbps * 1e3) if self.read_gbps else 0.0
        return max(compute, memory)


# Ceilings are measured (a large read, an 8192³ product on random data), not datasheet values.
H100 = DeviceSpec(
    platform="gpu",
    name="NVIDIA H100 80GB HBM3",
    capability=90,
    num_sms=132,
    smem_bytes=227 * 1024,
    l2_bytes=50 * 2**20,
    read_gbps=3186.0,
    bf16_tflops=812.0,
)
H200 = dataclasses.replace(
    H100, name="NVIDIA H200", l2_bytes=60 * 2**20, read_gbps=4679.0, bf16_tflops=823.0
)
CPU = DeviceSpec(platform="cpu", name="cpu")

_KNOWN = {spec.key: spec for spec in (H100, H200)}
_injected: list[DeviceSpec] = []


# jaxlib has no stubs, so `jax.Device` is a variable to pyright.
def from_jax(device: jax.Device) -> DeviceSpec:  # pyright: ignore[reportInvalidTypeForm]
    """Describe a JAX device; ceilings are 0 for devices nobody has measured."""
    if device.platform != "gpu":
        return CPU
    spec = DeviceSpec(
        platform="gpu",
        name=device.device_kind,
        capability=round(float(getattr(device, "compute_capability", 0)) * 10),
        num_sms=int(getattr(device, "core_count", 1)),
        smem_bytes=int(getattr(device, "shared_memory_per_block_optin", 0)) or 99 * 1024,
    )
    return _KNOWN.get(spec.key, spec)


def current_device() -> DeviceSpec:
    """The device that calls are planned for: the injected one, else JAX's default device."""
    if _injected:
        return _injected[-1]
    return from_jax(jax.devices()[0])


@contextlib.contextmanager
def use_device(spec: DeviceSpec) -> Iterator[None]:
    """Plan for `spec` inside the block, whatever the machine has (tests, cross-lowering)."""
    _injected.append(spec)
    try:
        yield
    finally:
        _injected.pop()
