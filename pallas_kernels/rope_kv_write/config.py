"""Which implementation of `rope_kv_write` is tried first, and whether the projection joins it."""

from collections.abc import Mapping
from typing import Any

from jaxinfer.pallas_kernels.device import DeviceSpec
from jaxinfer.pallas_kernels.matmul.config import (
    LARGE,
    Tiling,
    deepest,
    suits,
    with_room,
)
from jaxinfer.pallas_kernels.matmul.rotation import HEAD_DIMS, Heads
from jaxinfer.pallas_kernels.matmul.shape import Config

PREFERRED = ("mosaic", "xla")

# Of one launch for both, tilings that compete, by name: how many CTAs share the depth of a head,
# and the most that the weights in the ring take, KiB (0: what fits).
ONE_LAUNCH: dict[str, dict[str, Any]] = {
    "x1": {}, "x1-r96": {"ring_kib": 96},
    "x2": {"split": 2}, "x2-r96": {"split": 2, "ring_kib": 96},
}  # fmt: skip
_SHARED = "x2-r96"
# Of small weights: steps of SmolLM2, with heads of 64, are faster with one launch (the op's note).
# Heads of 256 (Gemma 3) were not measured in steps; alone they lose 1.9 µs, those of 64 1.1 to 2.1.
_WIDEST_OF_SMALL = 128
_MOST_TOKENS = 16  # in whole steps faster with 1 and 8, slower with 64; more by name
PREFERRED_TILINGS = (_SHARED, "x1")  # the first that suits


def with_projection(device: DeviceSpec, heads: Heads, *, M: int, D: int) -> tuple[str, ...]:
    """In which order one launch for both, and an op each, are tried.

    One launch comes first where steps are faster so on an H200: for large weights where two CTAs
    share the depth of a head (the Llama-3-8B shape), for small ones with heads of up to 128
    (SmolLM2). Where heads alone keep memory busy, or are wider, the product loses more than the
    rotation and its launch take.

    Args:
        device: What the call runs on.
        heads: What the columns of the product are.
        M: Tokens.
        D: Depth of the product.
    """
    if not device.is_hopper or M > _MOST_TOKENS or heads.H not in HEAD_DIMS:
        return ("separate", "mosaic")
    large = 2 * D * (heads.N + 2 * heads.K) * heads.H >= LARGE
    if large:
        better = one_launch_config(device, heads, M=M, D=D, tiling=_SHARED) is not None
    else:
        better = heads.H <= _WIDEST_OF_SMALL
    return ("mosaic", "separate") if better else ("separate", "mosaic")


def one_launch_config(
    device: DeviceSpec, heads: Heads, *, M: int, D: int, tiling: str | None = None
) -> Config | None:
    """Tiling of the projection's kernel where it rotates and writes too; None where none fits.

    Args:
        device: What the call runs on.
        heads: What the columns of the product are; a tile is a head.
        M: Tokens.
        D: Depth of the product.
        tiling: Of `ONE_LAUNCH`; None: the first of `PREFERRED_TILINGS` that suits.
    """
    names = PREFERRED_TILINGS if tiling is None else (tiling,)
    fitting = (_fit(device, heads, ONE_LAUNCH[name], M=M, D=D) for name in names)
    return next((config for config in fitting if config is not None), None)


def _fit(
    device: DeviceSpec, heads: Heads, tiling: Mapping[str, Any], *, M: int, D: int
) -> Config | None:
    if heads.most_tokens < M:
        return None
    wanted = Tiling(heads.bank, 64, **tiling)
    # CTAs share the depth of a head under the same conditions as that of any tile.
    if not suits(device, wanted, tiles=heads.N + 2 * heads.K, K=D):
        return None
    gated = heads.banks == 2  # as many weights as with a gate
    config = deepest(device, wanted, M=M, gated=gated)
    # A norm or not: tilings that depended on it would be measured apart.
    return with_room(config, device, M=M, gated=gated, tiles=heads.tiles, sums=True)
