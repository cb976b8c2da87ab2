"""Which implementation a dense attention call prefers."""

from jaxinfer.pallas_kernels.device import DeviceSpec


def preferred(device: DeviceSpec, *, head_dim: int) -> tuple[str, ...]:
    """Implementations in the order in which they are tried.

    Measured on an H100 in bfloat16 (`bench/results`): FlashAttention-3 leads at head_dim 128, and
    cuDNN, which comes with every CUDA build of JAX, at 64. tokamax is within a few per cent of the
    better one and is taken by name only.

    Args:
        device: What the call runs on.
        head_dim: H.
    """
    if device.is_hopper:
        first = ("cudnn", "flash_attn3") if head_dim < 128 else ("flash_attn3", "cudnn")
        return (*first, "xla")
    if device.platform == "gpu":
        return ("cudnn", "xla")
    return ("xla",)
