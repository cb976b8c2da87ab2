"""Which implementation and tiling a decode-attention call gets."""

import functools

from jaxinfer.pallas_kernels import tuning
from jaxinfer.pallas_kernels.decision import Preference, parse
from jaxinfer.pallas_kernels.decode_attention.shape import Config, tile_rows
from jaxinfer.pallas_kernels.device import DeviceSpec

PREFERRED = ("mosaic", "xla")

# What the kernel serves.
HEAD_DIMS = (64, 128, 256)
PAGE_SIZES = (16, 32, 64, 128)
MAX_ROWS = 64  # query rows per KV head

# Measured at these, and each stands for those below it, down to the next.
BATCHES = (1, 8, 64)  # of B
CAPACITIES = (1024, 8192, 32_768, 131_072)  # of S, tokens that the page table has room for
MAX_BATCH, MAX_CAPACITY = BATCHES[-1], CAPACITIES[-1]

# Tilings that compete in tuning with the heuristic's.
GRID = (
    Config(block=128, stages=2), Config(block=64, stages=2),
    Config(block=128, stages=3), Config(block=64, stages=4),
    Config(block=256, stages=2), Config(block=256, stages=3),
)  # fmt: skip
_MOST_REGISTERS = 192  # of what `Config.registers` counts: addresses and masks need some too
_SPILLING = 64  # above this, blocks of 128 keys make ptxas spill more than a few bytes

# Bytes of keys and values that a CTA asks for ahead. With more on their way memory reads more
# slowly, at 192 KiB by 2 to 3 %; half as many are as good where blocks are short (the op's note).
_RING = 128 << 10


def key(
    *, B: int, S: int, N: int, K: int, H: int, page_size: int, left_window: int | None = None
) -> str:
    """Name of a call in tuning data; B and S in buckets, since neighbours behave alike.

    A window that hides nothing at the bucket's S is none.
    """
    batch = next(size for size in BATCHES if size >= B)
    capacity = next(size for size in CAPACITIES if size >= S)
    words = [f"b{batch} s{capacity} n{N} k{K} h{H} p{page_size}"]
    words += [f"w{left_window}"] if left_window is not None and left_window < capacity - 1 else []
    return " ".join(words)


def choose_config(
    device: DeviceSpec,
    *,
    B: int,
    S: int,
    T: int,
    N: int,
    K: int,
    H: int,
    page_size: int,
    left_window: int | None = None,
    as_measured: bool = True,
) -> Preference[Config]:
    """The measured choice for a call on a device, else the kernel first.

    Lengths are not known when a call is traced, so that S stands for them. Where there is no tiling
    in the choice, the heuristic's is meant.

    Args:
        device: What the call runs on.
        B: Requests.
        S: Tokens that the page table has room for.
        T: Query tokens.
        N: Query heads.
        K: KV heads.
        H: Head dimension.
        page_size: p.
        left_window: Keys visible before a query's position; None: all.
        as_measured: Whether layout and softmax are those that are measured.
    """
    static: Preference[Config] = Preference(order=PREFERRED, config=None)
    known = as_measured and T == 1 and B <= MAX_BATCH and S <= MAX_CAPACITY
    if not (known and device.is_hopper):
        return static
    name = key(B=B, S=S, N=N, K=K, H=H, page_size=page_size, left_window=left_window)
    rows = tile_rows(N // K)
    check = functools.partial(check_fits, device=device, rows=rows, head_dim=H)
    read = functools.partial(parse, make=Config, default=None, check=check)
    return tuning.choice("decode_attention", device, name, read) or static


def check_fits(config: Config, device: DeviceSpec, *, rows: int, head_dim: int) -> None:
    """Raise ValueError if a tiling needs more shared memory or registers than there are."""
    if config.registers(rows=rows, head_dim=head_dim) > _MOST_REGISTERS:
        raise ValueError(
            f"config must leave registers for {rows} query rows of {head_dim} elements; got "
            f"{config}: use a smaller block"
        )
    needed = config.smem_bytes(rows=rows, head_dim=head_dim)
    if needed > device.smem_bytes:
        raise ValueError(
            f"config must fit {device.smem_bytes} bytes of shared memory; got {config}, which "
            f"needs {needed}: use fewer stages or a smaller block"
        )


def heuristic_config(device: DeviceSpec, *, rows: int, head_dim: int) -> Config:
    """Blocks of 128 keys if two fit and leave registers for the rows, else as many of 64.

    As many as `_RING` bytes hold of 128 keys, at least two.

    Args:
        device: What the call runs on.
        rows: Query rows per KV head, padded to a multiple of 8.
        head_dim: H.

    Raises:
        ValueError: not even two stages fit.
    """
    stages = max(2, _RING // (4 * 128 * head_dim))
    for config in (Config(block=128, stages=stages), Config(block=64, stages=stages)):
        fits = config.smem_bytes(rows=rows, head_dim=head_dim) <= device.smem_bytes
        spills = config.block == 128 and config.registers(rows=rows, head_dim=head_dim) > _SPILLING
        if fits and not spills:
            return config
    raise ValueError(f"no tiling fits {device.smem_bytes} bytes of shared memory")


def candidates(device: DeviceSpec, *, N: int, K: int, H: int, page_size: int) -> list[Config]:
    """Tilings for a call with one query token, for tuning, the heuristic's first.

    Empty if the kernel cannot serve the call. Arguments as of `choose_config`.
    """
    if H not in HEAD_DIMS or page_size not in PAGE_SIZES or N // K > MAX_ROWS:
        return []
    rows = tile_rows(N // K)
    try:
        first = heuristic_config(device, rows=rows, head_dim=H)
    except ValueError:
        return []  # calls that name no tiling raise it too
    fitting = [
        config for config in GRID
        if config.smem_bytes(rows=rows, head_dim=H) <= device.smem_bytes
        and config.registers(rows=rows, head_dim=H) <= _MOST_REGISTERS
    ]  # fmt: skip
    return list(dict.fromkeys([first, *fitting]))
