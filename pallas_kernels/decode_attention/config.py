"""Which implementation and tiling a decode-attention call gets."""

from jaxinfer.pallas_kernels.decode_attention.mosaic_sm90 import Config
from jaxinfer.pallas_kernels.device import DeviceSpec

PREFERRED = ("mosaic", "xla")


def heuristic_config(device: DeviceSpec, *, rows: int, head_dim: int, page_size: int) -> Config:
    """One CTA per SM with as deep a ring as shared memory allows, at most 6 stages.

    Args:
        device: What the call runs on.
        rows: Query rows per KV head, padded to a multiple of 8.
        head_dim: H.
        page_size: p.

    Raises:
        ValueError: not even two stages fit.
    """
    del page_size
    for stages in range(6, 1, -1):
        config = Config(stages=stages)
        if config.smem_bytes(rows=rows, head_dim=head_dim) <= device.smem_bytes:
            return config
    raise ValueError(f"no tiling fits {device.smem_bytes} bytes of shared memory")
