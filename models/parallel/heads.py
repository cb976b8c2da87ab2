"""Which heads each device computes."""

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HeadDivision:
    """Heads of `size` devices; all have equally many, some of which may be padding.

    Attributes:
        size: Devices.
        num_heads: Query heads of one device; a multiple of `num_kv_heads`.
        num_kv_heads: KV heads of one device.
        queries: For each device, the query head of the model behind each of its own; -1: padding.
        kv: The same of the KV heads. A model's KV head may occur several times.
    """

    size: int
    num_heads: int
    num_kv_heads: int
    queries: tuple[tuple[int, ...], ...]
    kv: tuple[tuple[int, ...], ...]


@functools.cache
def divide_heads(num_heads: int, num_kv_heads: int, size: int) -> HeadDivision:
    """Divide N query and K KV heads over n devices, whatever their numbers are.

    Every KV head is repeated r times, each time with a part of its group of query heads, and the
    r·K heads are dealt out in order. Parts and the last device's heads are filled up with padding:
    heads of zeros, whose output meets rows of zeros in the output projection. r is chosen so that
    a device has the fewest heads, KV heads counted like query heads, since the weights of both are
    equally large. Of equals it is the one with fewer KV heads: pages grow with these alone.

    (`ulysses_attention` has a rule of its own, `share_heads`: it stores no pages, so it minimises
    query heads.)

    >>> divide_heads(9, 3, 2).kv
    ((0, 1), (2, -1))
    >>> divide_heads(4, 1, 2).queries
    ((0, 1), (2, 3))
    """
    group = num_heads // num_kv_heads

    def local(copies: int) -> tuple[int, int]:
        """KV heads of a device, and query heads of each."""
        return -(-num_kv_heads * copies // size), -(-group // copies)

    def cost(copies: int) -> tuple[int, int]:
        kv, part = local(copies)
        return kv + kv * part, kv

    copies = min(range(1, group + 1), key=cost)
    per_device, part = local(copies)
    kv = np.full((size * per_device,), -1)
    queries = np.full((size * per_device, part), -1)
    for i in range(num_kv_heads * copies):
        head, first = i // copies, i % copies * part
        kv[i] = head
        of_part = range(first, min(first + part, group))
        queries[i, : len(of_part)] = [head * group + q for q in of_part]
    return HeadDivision(
        size=size,
        num_heads=per_device * part,
        num_kv_heads=per_device,
        queries=_rows(queries, size),
        kv=_rows(kv, size),
    )


def _rows(heads: np.ndarray, size: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in heads.reshape(size, -1).tolist())
