"""Windows between stripes: a rank holds every n-th token of a sequence.

Query i of rank r is at position i·n + r, key j of rank o at j·n + o. With e = (r - o) mod n the key
is not after the query if j <= i (o <= r) or j <= i - 1 (o > r); counted from that j, the keys at
most `left` positions before the query are (left - e) // n. For all pairs of ranks these are two
numbers at most, so that a window is static, as implementations need it, and a choice of two.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

# Output [B, T, N, H] and log-sum-exp [B, T, N], float32.
Part = tuple[jax.Array, jax.Array]


def window_before(window: int | tuple[int, int] | None) -> int | None:
    """Keys before a query's position that `local_window_size` of `attention` leaves; None: all.

    Raises:
        ValueError: a negative size.
    """
    if window is None:
        return None
    sides = (window,) if isinstance(window, int) else window
    if min(sides) < 0:
        raise ValueError(f"local_window_size must not be negative; got {window}")
    return sides[0]


def windows(left: int, num_ranks: int) -> tuple[int, int | None, int]:
    """The two windows that a window is to a stripe, and where the first ends.

    Args:
        left: Keys visible before a query's position, of the whole sequence.
        num_ranks: n.

    Returns:
        Keys before the query's in its own stripe and those that are at most `last` ranks before
        it; the same in the others, None: not even one key; and `last`.

    >>> windows(9, 4), windows(2, 4)
    ((2, 1, 1), (0, None, 2))
    """
    wide, last = divmod(left, num_ranks)
    return wide, wide - 1 if wide else None, last


def windowed(
    attend: Callable[..., Part],
    query: jax.Array,
    *,
    left: int | None,
    apart: jax.Array,
    num_ranks: int,
) -> Part:
    """Attend to one stripe under the part of a window that falls on it.

    Args:
        attend: Takes `local_window_size`, or nothing if there is none.
        query: `[B, T, N, H]` its queries.
        left: Keys visible before a query's position, of the whole sequence; None: all.
        apart: Rank of the queries less that of the keys, modulo n.
        num_ranks: n.
    """
    if left is None:
        return attend()
    wide, narrow, last = windows(left, num_ranks)

    def in_narrow() -> Part:
        return nothing(query) if narrow is None else attend(local_window_size=(narrow, 0))

    if last == num_ranks - 1:
        return attend(local_window_size=(wide, 0))
    return lax.cond(apart <= last, lambda: attend(local_window_size=(wide, 0)), in_narrow)


def nothing(query: jax.Array) -> Part:
    """What queries give that see no key."""
    return jnp.zeros_like(query, jnp.float32), jnp.full_like(query[..., 0], -jnp.inf, jnp.float32)
