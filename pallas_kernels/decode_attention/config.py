"""Which implementation and tiling a decode-attention call gets."""

from jaxinfer.pallas_kernels.decode_attention.mosaic_sm90 import Config
from jaxinfer.pallas_kernels.device import DeviceSpec

PREFERRED = ("mosaic", "xla")


# Bytes of keys and values that a CTA asks for ahead. Fewer do not hide the way from memory; more
# are spread over more of it, which then reads more slowly, at 192 KiB by 2 to 3 % (the op's note).
_RING = 128 << 10


def heuristic_config(device: DeviceSpec, *, rows: int, head_dim: int, page_size: int) -> Config:
    """Blocks of 128 keys if two fit, else of 64; stages for `_RING` bytes, at least two.

    Args:
        device: What the call runs on.
        rows: Query rows per KV head, padded to a multiple of 8.
        head_dim: H.
        page_size: p.

    Raises:
        ValueError: not even two stages fit.
    """
    del page_size
    for block in (128, 64):
        stages = max(2, _RING // (4 * block * head_dim))
        config = Config(block=block, stages=stages)
        if config.smem_bytes(rows=rows, head_dim=head_dim) <= device.smem_bytes:
            return config
    raise ValueError(f"no tiling fits {device.smem_bytes} bytes of shared memory")
