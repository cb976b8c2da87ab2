"""Sizes of one call of the Hopper kernels, and how query rows are cut into tiles."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels.decode_attention.layout import KVLayout
from jaxinfer.pallas_kernels.decode_attention.plan import Division

Softmax = Literal["online", "unified", "unified by phi"]


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
        if self.ctas_per_sm < 1:
            raise ValueError(f"ctas_per_sm must be positive; got {self.ctas_per_sm}")

    def smem_bytes(self, *, rows: int, head_dim: int) -> int:
        """Shared memory of one CTA, bytes (16-bit elements), barriers and scratch included."""
        stage = 2 * self.block * head_dim + rows * head_dim
        return 2 * (self.stages * stage + rows * (self.block + 64)) + 4096

    def registers(self, *, rows: int, head_dim: int) -> int:
        """That a thread needs for the logits of a block, sums of weights, and the accumulator."""
        return (2 * self.block + head_dim) * rows // 128


def tile_rows(*, segments: int, R: int) -> int:
    """Query rows of a tile.

    Args:
        segments: B·K, KV heads of all requests.
        R: Query rows of each.
    """
    if _can_cut(segments, R):
        return 8 if 8 % R == 0 else 16
    return -(-R // 8) * 8


def _can_cut(segments: int, R: int) -> bool:
    """Whether tiles can be cut from rows that are not padded.

    Tiles begin at multiples of 8. One of 8 rows, or of 16, then holds a whole head's rows and some
    of others': those are computed and dropped, which costs nothing, while padding would cost a
    launch.
    """
    total = segments * R
    return R < 8 and total % 8 == 0 and (8 % R == 0 or total >= 16)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Static sizes; R query rows (t, g) share a KV head, padded to `rows` (a multiple of 8)."""

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
    interpreted: bool = False

    @property
    def second_pass(self) -> bool:
        """Whether a kernel of its own merges pieces.

        Where pieces may be computed again nobody can tell when the last one is there, and the
        interpreter has no atomic addition.
        """
        return self.interpreted or self.softmax != "online"

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
        return tile_rows(segments=self.B * self.K, R=self.R)

    @property
    def stride(self) -> int:
        """Rows from one KV head's to the next's: R where tiles can be cut so, else padded."""
        return self.R if _can_cut(self.B * self.K, self.R) else self.rows

    def tile_of(self, segment):
        """First query row of the tile that holds a segment's rows, and where in it they begin.

        Args:
            segment: Number of a request and KV head, `request·K + head`.
        """
        row = segment * self.stride
        last = self.B * self.K * self.stride - self.rows
        start = row - row % 8
        start = min(start, last) if isinstance(start, int) else lax.min(start, jnp.int32(last))
        return start, row - start
