"""Tiling of the Hopper kernel, and the sizes of one call of it."""

import dataclasses

from jaxinfer.pallas_kernels.cluster_sum import ClusterSum
from jaxinfer.pallas_kernels.matmul.epilogue import Gate
from jaxinfer.pallas_kernels.matmul.rotation import Heads

CLUSTER = "in_cluster"  # name of the axis of a cluster's CTAs


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Tiling of the kernel.

    Attributes:
        block_n: Columns of the result per tile, 64 or 128; twice as many weights if gated.
        block_k: Depth of a stage of the ring, a multiple of 64.
        stages: Depth of the ring.
        cluster: CTAs that share their loads of tokens: 1 or 2.
        split: CTAs that share the depth of a tile: 1, 2, 4 or 8; only with a cluster of 1.
    """

    block_n: int = 64
    block_k: int = 128
    stages: int = 4
    cluster: int = 1
    split: int = 1

    def __post_init__(self) -> None:
        if self.block_n not in (64, 128):
            raise ValueError(f"block_n must be 64 or 128; got {self.block_n}")
        if self.block_k < 64 or self.block_k % 64:
            raise ValueError(f"block_k must be a multiple of 64; got {self.block_k}")
        if self.stages < 2:
            raise ValueError(f"stages must be at least 2; got {self.stages}")
        if self.cluster not in (1, 2):
            raise ValueError(f"cluster must be 1 or 2; got {self.cluster}")
        if self.split not in (1, 2, 4, 8):
            raise ValueError(f"split must be 1, 2, 4 or 8; got {self.split}")
        if self.split > 1 and self.cluster > 1:
            raise ValueError(f"cluster must be 1 where split is not; got {self.cluster}")

    def rows(self, M: int) -> int:
        """M tokens, padded: 8 for wgmma, and as many for each CTA that loads a part of them."""
        step = 8 * self.cluster
        return -(-M // step) * step

    def smem_bytes(self, M: int, *, gated: bool, tiles: int = 1, sums: bool = False) -> int:
        """Shared memory of one CTA, bytes (16-bit elements), barriers included.

        Args:
            M: Tokens.
            gated: Whether there are two weights per column.
            tiles: Of 16-bit elements: one of the result, or two if it is float32; one of a residual
                and one of a norm.
            sums: Whether there are sums over columns, for which Mosaic needs scratch.
        """
        rest = 1024 + (3072 if sums else 0)
        if (partial := self.partial(M, gated=gated)) is not None:
            rest += partial.smem_bytes
        tile = 2 * self.rows(M) * self.block_n
        return self.ring_bytes(M, gated=gated) + tiles * tile + rest

    def ring_bytes(self, M: int, *, gated: bool) -> int:
        """Shared memory of the ring, bytes."""
        weights = (2 if gated else 1) * self.block_n
        return 2 * self.stages * (weights + self.rows(M)) * self.block_k

    def partial(self, M: int, *, gated: bool) -> ClusterSum | None:
        """How the CTAs that share a tile's depth add up; None if there are none."""
        if self.split == 1:
            return None
        shape = (self.block_n, self.rows(M))
        return ClusterSum(axis=CLUSTER, ctas=self.split, shape=shape, count=2 if gated else 1)

    def accumulators(self, M: int, *, gated: bool) -> int:
        """Registers of a thread that hold sums."""
        return (2 if gated else 1) * self.block_n * self.rows(M) // 128


def num_ctas(tiles: int, *, num_sms: int, cluster: int) -> int:
    """The most CTAs that have the same number of tiles each, rounded up to whole clusters.

    A CTA more than that would leave all others waiting for the few with one tile more.
    """
    groups, places = -(-tiles // cluster), num_sms // cluster
    waves = -(-groups // places)
    return -(-groups // waves) * cluster


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Static sizes of a call.

    Attributes:
        M: Tokens.
        K: Depth.
        columns: Of the weight.
        transposed: Whether the weight is `[N, K]`.
        gate: As in the op.
        heads: What the columns are, if the product ends with a `Rotation`.
        eps: Of the norm that x still has to be divided by.
        square_tiles: Of that norm; 0 if there is none.
        config: Tiling.
        num_sms: Of the device.
    """

    M: int
    K: int
    columns: int
    transposed: bool
    gate: Gate | None
    heads: Heads | None
    eps: float
    square_tiles: int
    config: Config
    num_sms: int

    @property
    def banks(self) -> int:
        """Tiles of weights that a tile of the result needs at once."""
        if self.heads is not None:
            return self.heads.banks
        return 1 if self.gate is None else 2

    @property
    def out_n(self) -> int:
        """Columns of the result."""
        if self.heads is not None:
            return self.heads.N * self.heads.H
        return self.columns // self.banks

    @property
    def between_banks(self) -> int:
        """Columns from a tile's place in one bank to that in the next."""
        return self.columns // 2 if self.heads is None else self.heads.H // 2

    def column(self, tile):
        """First column of a tile in the first bank."""
        return tile * (self.config.block_n if self.heads is None else self.heads.H)

    @property
    def rows(self) -> int:
        """M, padded."""
        return self.config.rows(self.M)

    @property
    def tiles(self) -> int:
        """Tiles of the result."""
        return self.columns // (self.banks * self.config.block_n)

    @property
    def partial(self) -> ClusterSum | None:
        """As `Config.partial`."""
        return self.config.partial(self.M, gated=self.banks > 1)

    @property
    def ctas(self) -> int:
        """CTAs that have tiles; of those that share one, the first."""
        if self.config.split > 1:  # the others' sums of a tile are taken once
            return self.tiles
        return num_ctas(self.tiles, num_sms=self.num_sms, cluster=self.config.cluster)

    @property
    def waves(self) -> int:
        """Tiles of each CTA."""
        return -(-self.tiles // self.ctas)

    @property
    def k_steps(self) -> int:
        """Stages that a tile takes, of all CTAs that share its depth."""
        return self.K // self.config.block_k
