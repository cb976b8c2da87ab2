"""Which implementation and tiling a product gets."""

import dataclasses
import functools

from jaxinfer.pallas_kernels import tuning
from jaxinfer.pallas_kernels.decision import Preference, parse
from jaxinfer.pallas_kernels.device import DeviceSpec
from jaxinfer.pallas_kernels.matmul.shape import Config

BUCKETS = (1, 8, 16, 32, 64, 128)  # of M: measured at these, and each stands for those below it
MAX_ROWS = BUCKETS[-1]
# Most sums of a thread: of its 232 registers some hold addresses, and squares up to 64 for a norm.
MAX_ACCUMULATORS = 144
LARGE = 16 << 20  # bytes of a weight from which reading it, not launching, decides
# Of small products a launch more or less decides: where XLA multiplies, it adds a residual and
# prepares a norm in kernels of their own, 1.5 to 1.7 µs each on an H200.
_SMALL_GAIN_US = -1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Tiling:
    """A tiling for products of any number of tokens: how many stages depends on them.

    Attributes:
        block_n: As in `Config`.
        block_k: As in `Config`.
        cluster: As in `Config`.
        split: As in `Config`.
        ring_kib: Most that the weights in the ring take, KiB; 0: as many stages as fit, at most 12.
            With more requests on their way than needed memory reads more slowly.
    """

    block_n: int
    block_k: int
    cluster: int = 1
    split: int = 1
    ring_kib: int = 0

    @property
    def name(self) -> str:
        """Short: `n64-k128-c1`, with `-x2` if CTAs share a tile's depth and `-r96` for a ring."""
        words = [f"n{self.block_n}", f"k{self.block_k}", f"c{self.cluster}"]
        words += [f"x{self.split}"] if self.split > 1 else []
        words += [f"r{self.ring_kib}"] if self.ring_kib else []
        return "-".join(words)


# Tilings that compete in tuning. The heuristic's are among them.
GRID = (
    Tiling(128, 64), Tiling(128, 64, cluster=2), Tiling(128, 64, ring_kib=96),
    Tiling(64, 128), Tiling(64, 128, ring_kib=96), Tiling(64, 64), Tiling(64, 64, ring_kib=96),
    Tiling(64, 128, split=2), Tiling(64, 128, split=2, ring_kib=96), Tiling(64, 128, split=4),
    Tiling(64, 64, split=2),
)  # fmt: skip


def key(*, M: int, K: int, N: int, gated: bool, transposed: bool, cast: bool = False) -> str:
    """Name of a product in tuning data; M in buckets, since neighbours behave alike."""
    bucket = next(size for size in BUCKETS if size >= M)
    words = {"gated": gated, "transposed": transposed, "cast": cast}
    return " ".join([f"m{bucket} k{K} n{N}", *(word for word, holds in words.items() if holds)])


def least_gain_us(*, K: int, N: int) -> float:
    """What the kernel must save by itself to be chosen for a step, µs; less than 0: it may lose.

    Args:
        K: Depth.
        N: Columns of the weight.
    """
    return 0.0 if 2 * K * N >= LARGE else _SMALL_GAIN_US


def choose_config(
    device: DeviceSpec,
    *,
    M: int,
    K: int,
    N: int,
    gated: bool,
    transposed: bool,
    cast: bool = False,
) -> Preference[Config]:
    """The measured choice for a product on a device, else the heuristic's; no tiling if none fits.

    Args:
        device: What the call runs on.
        M: Rows of x.
        K: Depth.
        N: Columns of the weight, both halves of a gated one.
        gated: Whether the columns are pairs of gate and up.
        transposed: Whether the weight is `[N, K]`.
        cast: Whether the result has another dtype than x.
    """
    sizes = {"M": M, "K": K, "N": N, "gated": gated, "transposed": transposed, "cast": cast}
    static = heuristic(device, **sizes)
    if M > MAX_ROWS or not device.is_hopper:
        return static
    name = key(**sizes)

    def check(config: Config) -> None:
        check_divides(config, K=K, out_n=N // 2 if gated else N)
        check_fits(config, device, M=M, gated=gated, tiles=1 + cast)

    read = functools.partial(parse, make=Config, default=static.config, check=check)
    return tuning.choice("matmul", device, name, read) or static


def heuristic(
    device: DeviceSpec,
    *,
    M: int,
    K: int,
    N: int,
    gated: bool,
    transposed: bool,
    cast: bool = False,
) -> Preference[Config]:
    """The choice where nothing was measured. Arguments as of `choose_config`."""
    if M > MAX_ROWS or not device.is_hopper:
        return Preference(order=("xla",), config=None)
    # Large pairs of gate and up, with up to 8 tokens, take both within 7 % of the same time, either
    # way: there only a measurement prefers the kernel.
    close = gated and M <= 8 and 2 * K * N >= LARGE
    first = not (close or transposed or cast)
    config = heuristic_config(device, M=M, K=K, N=N, gated=gated, cast=cast)
    return Preference(order=("mosaic", "xla") if first else ("xla",), config=config)


def check_divides(config: Config, *, K: int, out_n: int) -> None:
    """Raise ValueError if a product does not consist of whole tiles, or has too little depth."""
    if K % config.block_k or out_n % config.block_n:
        raise ValueError(
            f"config must divide K = {K} and {out_n} columns; got {config.block_k} and "
            f"{config.block_n}"
        )
    if K // config.block_k < config.split:
        raise ValueError(f"config must leave steps for all: K = {K}, split {config.split} times")


def check_fits(
    config: Config, device: DeviceSpec, *, M: int, gated: bool, tiles: int = 1, sums: bool = False
) -> None:
    """Raise ValueError if a tiling needs more shared memory or registers than there are."""
    if config.accumulators(M, gated=gated) > MAX_ACCUMULATORS:
        raise ValueError(
            f"config must leave registers: sums may take {MAX_ACCUMULATORS} of a thread; those of "
            f"{config} take {config.accumulators(M, gated=gated)} for {M} tokens: use a smaller "
            f"block_n"
        )
    needed = config.smem_bytes(M, gated=gated, tiles=tiles, sums=sums)
    if needed > device.smem_bytes:
        raise ValueError(
            f"config must fit {device.smem_bytes} bytes of shared memory; got {config}, which "
            f"needs {needed} for {M} tokens: use fewer stages or smaller blocks"
        )


def with_room(
    config: Config | None, device: DeviceSpec, *, M: int, gated: bool, tiles: int, sums: bool
) -> Config | None:
    """A chosen tiling with as many stages fewer as what lies beside the ring takes.

    Args:
        config: The choice, which fits by itself.
        device: What the call runs on.
        M: Rows of x.
        gated: Whether there are two weights per column.
        tiles: As in `Config.smem_bytes`.
        sums: As in `Config.smem_bytes`.
    """
    while config is not None:
        if config.smem_bytes(M, gated=gated, tiles=tiles, sums=sums) <= device.smem_bytes:
            return config
        fewer = config.stages - 1
        config = dataclasses.replace(config, stages=fewer) if fewer >= 2 else None
    return None


def heuristic_config(
    device: DeviceSpec, *, M: int, K: int, N: int, gated: bool, cast: bool = False
) -> Config | None:
    """Tiles of 64 columns, in depth shared by CTAs where they are too few; None where nothing fits.

    On an H200 what `heuristic` takes is 1.09 times as fast as XLA, in the geometric mean over the
    products of four models of 7 to 70 billion weights with 1 to 128 tokens, and 0.94 at worst.
    """
    tiles = (N // 2 if gated else N) // 64
    block_k = 64 if K % 128 or M > 64 else 128
    splits = (4, 2, 1) if block_k == 128 and not gated else (1,)
    tilings = (Tiling(64, block_k, split=split) for split in splits)
    tiling = next(tiling for tiling in tilings if suits(device, tiling, tiles=tiles, K=K))
    return deepest(device, tiling, M=M, gated=gated, cast=cast)


def candidates(
    device: DeviceSpec, *, M: int, K: int, N: int, gated: bool, cast: bool = False
) -> list[Config]:
    """The tilings of `GRID` that a product allows, for tuning; empty if the kernel cannot do it.

    Args:
        device: What the call runs on.
        M: Rows of x.
        K: Depth.
        N: Columns of the weight, both halves of a gated one.
        gated: Whether the columns are pairs of gate and up.
        cast: Whether the result is float32.
    """
    sizes = {"M": M, "K": K, "N": N, "gated": gated, "cast": cast}
    found = (fit(device, tiling, **sizes) for tiling in GRID)
    # Where few stages fit in any case, two tilings may come to the same.
    return list(dict.fromkeys(config for config in found if config is not None))


def fit(
    device: DeviceSpec, tiling: Tiling, *, M: int, K: int, N: int, gated: bool, cast: bool = False
) -> Config | None:
    """A tiling for a product; None if it does not suit it. Arguments as of `candidates`."""
    out_n = N // 2 if gated else N
    if out_n % tiling.block_n or K % tiling.block_k or (tiling.cluster > 1 and M <= 8):
        return None
    if not suits(device, tiling, tiles=out_n // tiling.block_n, K=K):
        return None
    return deepest(device, tiling, M=M, gated=gated, cast=cast)


def suits(device: DeviceSpec, tiling: Tiling, *, tiles: int, K: int) -> bool:
    """Whether there is depth to share, if a tiling shares it.

    CTAs do where tiles alone are too few, and to save more than adding takes.

    Args:
        device: What the call runs on.
        tiling: A tiling.
        tiles: Of the result.
        K: Depth.
    """
    split, steps = tiling.split, K // tiling.block_k
    return split == 1 or (tiles * split <= device.num_sms and steps >= 4 * split)


def deepest(
    device: DeviceSpec, tiling: Tiling, *, M: int, gated: bool, cast: bool = False
) -> Config | None:
    """A tiling with the deepest ring that it allows and that fits; None if not even two stages do.

    Args:
        device: What the call runs on.
        tiling: Everything else.
        M: Rows of x.
        gated: Whether there are two weights per column.
        cast: Whether the result is float32, which takes two tiles.
    """
    for stages in range(12, 1, -1):
        config = Config(
            block_n=tiling.block_n, block_k=tiling.block_k, stages=stages, cluster=tiling.cluster,
            split=tiling.split,
        )  # fmt: skip
        if config.accumulators(M, gated=gated) > MAX_ACCUMULATORS:
            return None
        if tiling.ring_kib and config.ring_bytes(0, gated=gated) > tiling.ring_kib << 10:
            continue
        if config.smem_bytes(M, gated=gated, tiles=1 + cast) <= device.smem_bytes:
            return config
    return None
