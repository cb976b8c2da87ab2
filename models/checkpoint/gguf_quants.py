"""Blocks of quantised weights in GGUF files, as float32.

A row of a matrix is cut into blocks of 32 or 256 numbers, each with its scales. The layouts are
those of ggml's `block_*` structures; the order of the floating-point operations is ggml's too, so
that results are equal to the bit.
"""

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable

import ml_dtypes
import numpy as np

# Numbers per piece of work. Fewer, and threads wait for the interpreter's lock between numpy's
# calls; more, and the intermediate results leave the cache.
_PIECE = 1 << 19


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BlockType:
    """How one quantisation type stores numbers.

    Attributes:
        numbers: In a block.
        size_bytes: Of a block.
        decode: `[n, size_bytes]` uint8 to `[n, numbers]` float32.
    """

    numbers: int
    size_bytes: int
    decode: Callable[[np.ndarray], np.ndarray]


def dequantize(raw: np.ndarray, kind: str, shape: tuple[int, int]) -> np.ndarray:
    """A stored matrix `[out, in]` as float32 `[in, out]`.

    Args:
        raw: uint8, `[out, bytes of a row]`.
        kind: A key of `BLOCK_TYPES`.
        shape: `(out, in)`; `in` is a multiple of the block.

    Returns:
        `[in, out]` float32, contiguous.
    """
    rows, columns = shape
    out = _aligned((columns, rows))

    def place(first: int, last: int) -> None:
        out[:, first:last] = _decode(raw[first:last], kind).reshape(-1, columns).T

    _in_pieces(place, rows, columns)
    return out


def dequantize_rows(raw: np.ndarray, kind: str, shape: tuple[int, int]) -> np.ndarray:
    """A stored matrix `[out, in]` as float32 `[out, in]`; see `dequantize`."""
    rows, columns = shape
    out = _aligned((rows, columns))

    def place(first: int, last: int) -> None:
        out[first:last] = _decode(raw[first:last], kind).reshape(-1, columns)

    _in_pieces(place, rows, columns)
    return out


def _aligned(shape: tuple[int, int]) -> np.ndarray:
    """Fresh float32 memory that JAX can use on a CPU without copying it."""
    count, extra = shape[0] * shape[1], 16
    flat = np.empty(count + extra, np.float32)
    start = -flat.ctypes.data // 4 % extra
    return flat[start : start + count].reshape(shape)


def _in_pieces(place: Callable[[int, int], None], rows: int, columns: int) -> None:
    step = max(_PIECE // columns, 1)
    starts = range(0, rows, step)
    if len(starts) < 2:
        place(0, rows)
        return
    # numpy lets go of the interpreter lock in its loops.
    with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
        list(pool.map(lambda first: place(first, min(first + step, rows)), starts))


def _decode(raw: np.ndarray, kind: str) -> np.ndarray:
    block = BLOCK_TYPES[kind]
    return block.decode(raw.reshape(-1, block.size_bytes))


def _f16(blocks: np.ndarray, start: int) -> np.ndarray:
    """The half-precision number at byte `start` of every block, `[n, 1]` float32."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Low halves of all bytes, then high halves: `[…, b]` to `[…, 2, b]`."""
    return np.stack((packed & 15, packed >> 4), axis=-2)


def _two_bits(packed: np.ndarray) -> np.ndarray:
    """Bit pairs from the lowest up: `[…, b]` to `[…, 4, b]`."""
    return np.stack((packed & 3, packed >> 2 & 3, packed >> 4 & 3, packed >> 6), axis=-2)


def _bits(packed: np.ndarray) -> np.ndarray:
    """`[…, b]` bytes to `[…, 8·b]` bits, the lowest of each byte first."""
    return np.unpackbits(packed, axis=-1, bitorder="little")


def _bit_planes(packed: np.ndarray) -> np.ndarray:
    """`[n, b]` bytes to `[n, 8, b]`: bit i of every byte in plane i."""
    return packed[:, None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1


def _floats(dtype: np.typing.DTypeLike) -> Callable[[np.ndarray], np.ndarray]:
    return lambda blocks: np.ascontiguousarray(blocks).view(dtype).astype(np.float32)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    quants = _nibbles(blocks[:, 2:]).reshape(-1, 32).view(np.int8) - np.int8(8)
    return _f16(blocks, 0) * quants


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    out = _f16(blocks, 0) * _nibbles(blocks[:, 4:]).reshape(-1, 32)
    out += _f16(blocks, 2)
    return out


def _q5(blocks: np.ndarray, start: int) -> np.ndarray:
    """4 bytes of high bits and 16 of low halves, `[n, 32]` uint8 below 32."""
    return _nibbles(blocks[:, start + 4 :]).reshape(-1, 32) | (
        _bits(blocks[:, start : start + 4]) << 4
    )


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    return _f16(blocks, 0) * (_q5(blocks, 2).view(np.int8) - np.int8(16))


def _q5_1(blocks: np.ndarray) -> np.ndarray:
    out = _f16(blocks, 0) * _q5(blocks, 4)
    out += _f16(blocks, 2)
    return out


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return _f16(blocks, 0) * blocks[:, 2:].view(np.int8)


def _affine(quants: np.ndarray, scales: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Groups `[n, groups, size]` times their scales, less their offsets, as `[n, 256]`."""
    out = scales[..., None] * quants
    out -= offsets[..., None]
    return out.reshape(-1, 256)


def _q2_k(blocks: np.ndarray) -> np.ndarray:
    scales = blocks[:, :16]
    quants = _two_bits(blocks[:, 16:80].reshape(-1, 2, 32)).reshape(-1, 16, 16)
    return _affine(quants, _f16(blocks, 80) * (scales & 15), _f16(blocks, 82) * (scales >> 4))


def _q3_k(blocks: np.ndarray) -> np.ndarray:
    # Groups go by half of the block, then by bit pair, then by 16.
    low = _two_bits(blocks[:, 32:96].reshape(-1, 2, 32)).reshape(-1, 256)
    high = _bit_planes(blocks[:, :32]).reshape(-1, 256)
    quants = (low | high << 2).view(np.int8) - np.int8(4)
    packed = blocks[:, 96:108]
    scales = _nibbles(packed[:, :8]).reshape(-1, 16) | (
        _two_bits(packed[:, 8:]).reshape(-1, 16) << 4
    )
    factor = _f16(blocks, 108) * (scales.view(np.int8) - np.int8(32))
    return (factor[..., None] * quants.reshape(-1, 16, 16)).reshape(-1, 256)


def _six_bit_scales(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """12 bytes as 8 scales and 8 minima of 6 bits: the first four lie low, the rest is spread."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate((first & 63, third & 15 | first >> 6 << 4), axis=1)
    minima = np.concatenate((second & 63, third >> 4 | second >> 6 << 4), axis=1)
    return scales, minima


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    scales, minima = _six_bit_scales(blocks[:, 4:16])
    quants = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return _affine(quants, _f16(blocks, 0) * scales, _f16(blocks, 2) * minima)


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    scales, minima = _six_bit_scales(blocks[:, 4:16])
    quants = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    quants = quants | _bit_planes(blocks[:, 16:48]) << 4
    return _affine(quants, _f16(blocks, 0) * scales, _f16(blocks, 2) * minima)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 256)
    high = _two_bits(blocks[:, 128:192].reshape(-1, 2, 32)).reshape(-1, 256)
    quants = (low | high << 4).view(np.int8) - np.int8(32)
    factor = _f16(blocks, 208) * blocks[:, 192:208].view(np.int8)
    return (factor[..., None] * quants.reshape(-1, 16, 16)).reshape(-1, 256)


def _block(numbers: int, size_bytes: int, decode: Callable[[np.ndarray], np.ndarray]) -> BlockType:
    return BlockType(numbers=numbers, size_bytes=size_bytes, decode=decode)


BLOCK_TYPES = {
    "F32": _block(1, 4, _floats(np.float32)),
    "F16": _block(1, 2, _floats(np.float16)),
    "BF16": _block(1, 2, _floats(ml_dtypes.bfloat16)),
    "Q4_0": _block(32, 18, _q4_0),
    "Q4_1": _block(32, 20, _q4_1),
    "Q5_0": _block(32, 22, _q5_0),
    "Q5_1": _block(32, 24, _q5_1),
    "Q8_0": _block(32, 34, _q8_0),
    "Q2_K": _block(256, 84, _q2_k),
    "Q3_K": _block(256, 110, _q3_k),
    "Q4_K": _block(256, 144, _q4_k),
    "Q5_K": _block(256, 176, _q5_k),
    "Q6_K": _block(256, 210, _q6_k),
}
