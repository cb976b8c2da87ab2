"""Which implementation a dense attention call prefers."""

from jaxinfer.pallas_kernels.device import DeviceSpec


def preferred(device: DeviceSpec) -> tuple[str, ...]:
    """Implementations in the order in which they are tried.

    Measured on an H100 in bfloat16 (`bench/results`): FlashAttention-3 leads up to 8 K tokens and
    stays within a few per cent beyond; cuDNN comes with every CUDA build of JAX.
    """
    if device.is_hopper:
        return ("flash_attn3", "cudnn", "xla")
    if device.platform == "gpu":
        return ("cudnn", "xla")
    return ("xla",)
