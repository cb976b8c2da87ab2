"""Which implementation and tiling a decode-attention call gets."""

from jaxinfer.pallas_kernels.decode_attention.mosaic_sm90 import Config
from jaxinfer.pallas_kernels.device import DeviceSpec

PREFERRED = ("mosaic", "xla")


def heuristic_config(device: DeviceSpec, *, rows: int, head_dim: int, page_size: int) -> Config:
    """Blocks of 128 keys and the deepest ring that fits, at most 4 stages; else blocks of 64.

    The larger block won or tied on every measured shape (docs/kernels/decode_attention.md).

    Args:
        device: What the call runs on.
        rows: Query rows per KV head, padded to a multiple of 8.
        head_dim: H.
        page_size: p.

    Raises:
        ValueError: not even two stages fit.
    """
    del page_size
    for block, fewest, most in ((128, 3, 4), (64, 2, 6)):
        for stages in range(most, fewest - 1, -1):
            config = Config(block=block, stages=stages)
            if config.smem_bytes(rows=rows, head_dim=head_dim) <= device.smem_bytes:
                return config
    raise ValueError(f"no tiling fits {device.smem_bytes} bytes of shared memory")
