"""How one decode-attention call is divided over the GPU: equal shares of the real work.

The work is a list of units, one unit being `block` keys of one request, ordered by (request,
block). CTAs come in groups of K, one for each KV head. Group g takes units
`[g·share, (g+1)·share)`, whatever requests they belong to, so ragged lengths cost no balance; its
CTAs read the heads of the same pages at about the same time, which lie side by side in memory.

Where a group's boundary falls inside a request, the request's result comes in pieces that are
merged in the end. The piece of request b that group g computes is number g + b: walking through the
units, every new piece raises g or b or both, so no two pieces share a number and those of a request
are neighbours.

The division follows from `lengths` and is worked out inside the kernels, by every CTA for itself:
lengths change every step and must not recompile anything, and kernels that prepared it took longer
than short calls.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

_UNROLLED = 64  # requests up to which their lengths are read all at once
_int = jnp.int32

Scalar = Any  # an int32 scalar, traced
Lengths = Any  # an array or a reference of B int32, or `Bounded`


@dataclasses.dataclass(frozen=True, slots=True)
class Bounded:
    """Lengths, but none below zero or beyond a request's part of the page table.

    What comes after it is another request's.

    Attributes:
        lengths: `[B]` int32.
        capacity: Keys that there is room for.
    """

    lengths: Lengths
    capacity: int

    def __getitem__(self, request: Scalar) -> Scalar:
        """Length of a request, bounded."""
        return lax.clamp(_int(0), self.lengths[request], _int(self.capacity))


class Start(NamedTuple):
    """Where a group begins, and how far it goes.

    Attributes:
        request: Of its first unit.
        block: Of its first unit.
        units: That it computes.
        unit: Number of its first unit among all.
        share: Units of a group that is not short.
    """

    request: Scalar
    block: Scalar
    units: Scalar
    unit: Scalar
    share: Scalar


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Division:
    """What is static about the division of a call.

    Attributes:
        B: Requests.
        T: Query tokens of each.
        block: Keys per unit.
        groups: Groups of CTAs.
        left_window: Keys that a query sees before its own position; None: all.
    """

    B: int
    T: int
    block: int
    groups: int
    left_window: int | None = None

    @property
    def pieces(self) -> int:
        """Upper bound on piece numbers of one head: the largest g + b, plus one."""
        return self.groups + self.B - 1

    def blocks(self, length: Scalar) -> tuple[Scalar, Scalar]:
        """First block of a request that any query can see, and one past the last."""
        block = _int(self.block)
        end = lax.div(length + (block - 1), block)
        if self.left_window is None:
            return _int(0), end
        first = lax.div(lax.max(length - (self.T + self.left_window), _int(0)), block)
        return lax.min(first, end), end

    def start(self, lengths: Lengths, group: Scalar) -> Start:
        """What a group computes.

        Args:
            lengths: `[B]` int32, keys of each request, its query tokens included.
            group: g.
        """
        # A few lengths are read all at once, before anything waits for them.
        counts = None if self.B > _UNROLLED else [self._count(lengths, b) for b in range(self.B)]

        def over_requests(step: Callable[[Scalar, Any], Any], carry: Any) -> Any:
            if counts is None:
                return lax.fori_loop(
                    0, self.B, lambda b, c: step(self._count(lengths, b), c), carry
                )
            return functools.reduce(lambda carry, count: step(count, carry), counts, carry)

        total = over_requests(lambda count, total: total + count, _int(0))
        share = lax.max(lax.div(total + (self.groups - 1), _int(self.groups)), _int(1))
        unit = group * share

        def skip(count, carry):
            request, skipped, before = carry
            after = before + count
            past = unit >= after
            return request + past.astype(jnp.int32), lax.select(past, after, skipped), after

        request, skipped, _ = over_requests(skip, (_int(0), _int(0), _int(0)))
        request = lax.min(request, _int(self.B - 1))
        first, _ = self.blocks(lengths[request])
        units = lax.clamp(_int(0), total - unit, share)
        return Start(request, first + unit - skipped, units, unit, share)

    def following(self, lengths: Lengths, request: Scalar, block: Scalar) -> tuple[Scalar, Scalar]:
        """Request and block of the unit after this one; anything if this is the last."""
        _, end = self.blocks(lengths[request])

        def is_empty(request):
            first, end = self.blocks(lengths[request])
            return (first >= end) & (request < self.B - 1)

        def switch():
            new = lax.min(request + 1, _int(self.B - 1))
            new = lax.while_loop(is_empty, lambda request: request + 1, new)
            return new, self.blocks(lengths[new])[0]

        return lax.cond(block + 1 < end, lambda: (request, block + 1), switch)

    def pieces_of(
        self, request: Scalar, length: Scalar, *, first_unit: Scalar, share: Scalar
    ) -> tuple[Scalar, Scalar]:
        """Number of a request's first piece, and how many it has.

        Args:
            request: b.
            length: Of the request.
            first_unit: Number of its first unit; anything if it has none.
            share: Units of a group.
        """
        first, end = self.blocks(length)
        first_piece = lax.div(first_unit, share)
        last_piece = lax.div(first_unit + end - first - 1, share)
        return first_piece + request, lax.select(end > first, last_piece - first_piece + 1, _int(0))

    def _count(self, lengths: Lengths, request: Any) -> Scalar:
        first, end = self.blocks(lengths[request])
        return end - first


def num_groups(*, num_ctas: int, num_kv_heads: int) -> int:
    """Groups of K CTAs that are resident together; at least one."""
    return max(num_ctas // num_kv_heads, 1)
