"""Sizes of one call of the Hopper kernels."""

import dataclasses
from typing import Literal

from jaxinfer.pallas_kernels.decode_attention.layout import KVLayout
from jaxinfer.pallas_kernels.decode_attention.plan import Division

Softmax = Literal["online", "unified", "unified by phi"]

_MOST_PIECES = 24  # three times as many as are loaded at once
_MOST_MERGED = 32 * 128  # values, 32 per thread


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Tiling of the kernel.

    Attributes:
        block: Keys per unit of work and per stage of the ring: 64, 128 or 256.
        stages: Depth of the ring.
        ctas_per_sm: Resident CTAs per SM; more hide latency, fewer divide the work more evenly.
    """

    block: int = 64
    stages: int = 4
    ctas_per_sm: int = 1

    def __post_init__(self) -> None:
        if self.block not in (64, 128, 256):
            raise ValueError(f"block must be 64, 128 or 256; got {self.block}")
        if self.stages < 2:
            raise ValueError(f"stages must be at least 2; got {self.stages}")
        if not 1 <= self.ctas_per_sm <= 32:  # the most that an SM holds
            raise ValueError(f"ctas_per_sm must be 1 to 32; got {self.ctas_per_sm}")

    def smem_bytes(self, *, rows: int, head_dim: int) -> int:
        """Shared memory of one CTA, bytes (16-bit elements), barriers and scratch included."""
        stage = 2 * self.block * head_dim + rows * head_dim
        return 2 * (self.stages * stage + rows * (self.block + 64)) + 4096

    def registers(self, *, rows: int, head_dim: int) -> int:
        """That a thread needs for the logits of a block, sums of weights, and the accumulator."""
        return (2 * self.block + head_dim) * rows // 128


def tile_rows(R: int) -> int:
    """Rows of the tile that holds the R query rows of a KV head: a multiple of 8."""
    return -(-R // 8) * 8


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Static sizes; R query rows (t, g) share a KV head, padded to `rows` (a multiple of 8).

    `capacity` is the most keys that a request's part of the page table has room for.
    """

    B: int
    T: int
    K: int
    G: int
    H: int
    page_size: int
    kv_layout: KVLayout
    config: Config
    groups: int
    scale: float
    left_window: int | None
    softcap: float | None
    softmax: Softmax
    capacity: int
    interpreted: bool = False

    @property
    def second_pass(self) -> bool:
        """Whether a kernel of its own merges pieces.

        Where pieces may be computed again nobody can tell when the last one is there. One CTA
        would take long for many pieces, and has no registers for large ones beside its own. And
        the interpreter has no atomic addition.
        """
        seen = self.capacity
        if self.left_window is not None:  # a piece more where it begins within a block
            seen = min(seen, self.left_window + self.T + self.config.block)
        most = min(self.groups, -(-seen // self.config.block))
        large = self.H * self.rows > _MOST_MERGED
        return self.interpreted or self.softmax != "online" or most > _MOST_PIECES or large

    @property
    def R(self) -> int:
        """Query rows that share a KV head."""
        return self.T * self.G

    @property
    def division(self) -> Division:
        """How the keys are divided over groups of CTAs."""
        return Division(
            B=self.B, T=self.T, block=self.config.block, groups=self.groups,
            left_window=self.left_window,
        )  # fmt: skip

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return tile_rows(self.R)

    @property
    def held_rows(self) -> int:
        """Of a KV head's query rows in memory.

        A tiled copy reads past the end of an array, as zeros, if that is less than a tile. So R,
        unless it is more than 8 and no multiple of 8; else padding would cost a launch.
        """
        return self.R if self.R < 8 else self.rows
