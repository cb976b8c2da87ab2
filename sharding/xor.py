"""Pairwise exchanges for powers of two, 4 included: every link, every step, no table."""

import numpy as np
import numpy.typing as npt

from jaxinfer.sharding.checks import at_least
from jaxinfer.sharding.schedule import Schedule

# Irreducible polynomials over GF(2) by degree; bit i is the coefficient of x^i.
POLYNOMIALS = {
    1: 0b11, 2: 0b111, 3: 0b1011, 4: 0b1_0011, 5: 0b10_0101, 6: 0b100_0011, 7: 0b1000_0011,
    8: 0b1_0001_1011, 9: 0b10_0001_0001, 10: 0b100_0000_1001,
}  # fmt: skip


def field_multiply(
    left: npt.NDArray[np.integer], right: npt.NDArray[np.integer], degree: int
) -> npt.NDArray[np.int32]:
    """Multiply elements of GF(2^degree), elementwise with broadcasting.

    Args:
        left: Elements, 0 ≤ x < 2^degree.
        right: As `left`.
        degree: A key of `POLYNOMIALS`.

    Returns:
        Products in the field.
    """
    a, b = (np.asarray(x, dtype=np.int32) for x in (left, right))
    product = np.zeros(np.broadcast_shapes(a.shape, b.shape), np.int32)
    for bit in range(degree):
        product ^= np.where(b >> bit & 1, a, 0)
        a = a << 1
        a = np.where(a >> degree & 1, a ^ POLYNOMIALS[degree], a)
    return product


def xor(num_ranks: int) -> Schedule:
    """Exchange pieces with rank x ⊕ a·(p[t] ⊕ p[t+1]) in lane a - 1 at step t.

    Ranks are the elements of GF(2^k) and p is the Gray code, a path through all of them. A
    product with a fixed nonzero a permutes the field, so a piece visits every rank; for a fixed
    step the n - 1 products are all nonzero elements, so every link is used once. Every lane is
    an exchange between pairs.

    Args:
        num_ranks: n, a power of two from 2 to 1024.

    Returns:
        A schedule of n - 1 steps and n - 1 lanes; pieces stay in their lane.

    Raises:
        ValueError: If `num_ranks` is not such a power of two.

    Example:
        >>> schedule = xor(4)
        >>> schedule.validate()
        >>> schedule.destination[0].tolist()
        [[1, 2, 3], [0, 3, 2], [3, 0, 1], [2, 1, 0]]
    """
    n = at_least("num_ranks", num_ranks, 2, " for an exchange")
    degree = n.bit_length() - 1
    if n & (n - 1) or degree not in POLYNOMIALS:
        raise ValueError(f"num_ranks must be a power of two, 2 to 1024, for xor; got {n}")
    path = np.arange(n) ^ (np.arange(n) >> 1)
    factor = np.arange(1, n)
    ranks = np.arange(n)[None, :, None]
    travelled = field_multiply(path[:-1, None], factor, degree)[:, None, :]
    move = field_multiply((path[1:] ^ path[:-1])[:, None], factor, degree)[:, None, :]
    return Schedule(
        name="xor",
        num_ranks=n,
        pieces_per_rank=n - 1,
        owner=np.repeat(np.arange(n, dtype=np.int32), n - 1),
        destination=ranks ^ move,
        piece=(ranks ^ travelled) * (n - 1) + factor - 1,
    )
