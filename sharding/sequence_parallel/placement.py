"""Which rank holds which tokens of a sequence that is sharded over n ranks.

With c tokens per rank, rank r holds, in this order:

* `contiguous`: tokens r·c … r·c + c - 1. Under a causal mask the last rank has the most work.
* `zigzag`: the sequence is cut into 2n chunks; rank r holds chunks r and 2n - 1 - r. Under a
  causal mask all ranks have the same work.
* `striped`: tokens r, r + n, r + 2n, … (Striped Attention, arXiv 2311.09431).

In every placement a rank's tokens are in ascending order, so the ones before any position are the
first of its block. Lengths and causal masks are counts of leading tokens because of that.
"""

import difflib
from typing import Literal

import jax
import jax.numpy as jnp

Placement = Literal["contiguous", "zigzag", "striped"]
PLACEMENTS = ("contiguous", "zigzag", "striped")


def place(x: jax.Array, placement: Placement, num_ranks: int, *, axis: int = 1) -> jax.Array:
    """Reorder the tokens of a whole sequence so that rank r's tokens are the r-th of n equal parts.

    Args:
        x: Any array with S tokens along `axis`.
        placement: `"contiguous"`, `"zigzag"` or `"striped"`.
        num_ranks: n; divides S (2n does, for zigzag).
        axis: Axis of the tokens.

    Returns:
        An array of the same shape.

    Raises:
        ValueError: If the placement is unknown, or S is not a multiple of n (2n).

    Example:
        >>> place(jnp.arange(8), "zigzag", 2, axis=0).tolist()
        [0, 1, 6, 7, 2, 3, 4, 5]
    """
    return _reorder(x, placement, num_ranks, axis, back=False)


def unplace(x: jax.Array, placement: Placement, num_ranks: int, *, axis: int = 1) -> jax.Array:
    """Undo `place`; arguments and errors as there.

    Example:
        >>> unplace(place(jnp.arange(6), "striped", 3, axis=0), "striped", 3, axis=0).tolist()
        [0, 1, 2, 3, 4, 5]
    """
    return _reorder(x, placement, num_ranks, axis, back=True)


def positions(
    placement: Placement, rank: int | jax.Array, num_ranks: int, tokens_per_rank: int
) -> jax.Array:
    """`[c]` int32 positions in the whole sequence of a rank's tokens, for rotary embeddings.

    Args:
        placement: `"contiguous"`, `"zigzag"` or `"striped"`.
        rank: r; may be traced (`jax.lax.axis_index`).
        num_ranks: n.
        tokens_per_rank: c; even for zigzag.

    Raises:
        ValueError: If the placement is unknown, or c is odd with zigzag.

    Example:
        >>> positions("striped", 1, 3, 4).tolist()
        [1, 4, 7, 10]
    """
    multiple = chunks_per_rank(placement)
    if tokens_per_rank % multiple:
        raise ValueError(f"zigzag needs an even number of tokens per rank; got {tokens_per_rank}")
    index = jnp.arange(tokens_per_rank, dtype=jnp.int32)
    if placement == "striped":
        return index * num_ranks + rank
    if placement == "contiguous":
        return index + rank * tokens_per_rank
    half = tokens_per_rank // 2
    return jnp.where(
        index < half, index + rank * half, index + (2 * num_ranks - 1 - rank) * half - half
    )


def count_before(
    position: jax.Array,
    placement: Placement,
    rank: int | jax.Array,
    num_ranks: int,
    tokens_per_rank: int,
) -> jax.Array:
    """How many of a rank's tokens lie before a position; they are the first of its block.

    Args:
        position: Integers of any shape.
        placement: `"contiguous"`, `"zigzag"` or `"striped"`.
        rank: r; may be traced, and of a shape that broadcasts with `position`.
        num_ranks: n.
        tokens_per_rank: c.

    Returns:
        Counts from 0 to c.

    Example:
        >>> [int(count_before(jnp.int32(5), "zigzag", rank, 2, 4)) for rank in range(2)]
        [2, 3]
    """
    if placement == "striped":
        return jnp.clip((position - rank + num_ranks - 1) // num_ranks, 0, tokens_per_rank)
    if placement == "contiguous":
        return jnp.clip(position - rank * tokens_per_rank, 0, tokens_per_rank)
    half = tokens_per_rank // 2
    low = jnp.clip(position - rank * half, 0, half)
    return low + jnp.clip(position - (2 * num_ranks - 1 - rank) * half, 0, half)


def padded_length(length: int, num_ranks: int, placement: Placement, pieces: int = 1) -> int:
    """The least number of tokens, at least `length`, that every rank can cut into its pieces.

    Args:
        length: S, tokens of the sequence.
        num_ranks: n.
        placement: `"contiguous"`, `"zigzag"` or `"striped"`.
        pieces: m, pieces per rank of the schedule.

    Example:
        >>> padded_length(100, 8, "zigzag", pieces=7)
        112
    """
    multiple = num_ranks * chunks_per_rank(placement) * pieces
    return -(-length // multiple) * multiple


def chunks_per_rank(placement: Placement) -> int:
    """Runs of tokens at equal distances that a rank holds: two in zigzag, otherwise one.

    Raises:
        ValueError: If the placement is unknown.
    """
    if placement not in PLACEMENTS:
        near = difflib.get_close_matches(str(placement), PLACEMENTS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown placement {placement!r}; {hint}known: {', '.join(PLACEMENTS)}")
    return 2 if placement == "zigzag" else 1


def _reorder(
    x: jax.Array, placement: Placement, num_ranks: int, axis: int, *, back: bool
) -> jax.Array:
    parts = num_ranks * chunks_per_rank(placement)
    tokens = x.shape[axis]
    if tokens % parts:
        raise ValueError(
            f"{placement} placement on {num_ranks} ranks needs a multiple of {parts} tokens; "
            f"got {tokens}: pad to {padded_length(tokens, num_ranks, placement)}"
        )
    if placement == "contiguous":
        return x
    axis %= x.ndim
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    if placement == "striped":
        rows, columns = (num_ranks, -1) if back else (-1, num_ranks)
        return x.reshape(*before, rows, columns, *after).swapaxes(axis, axis + 1).reshape(x.shape)
    # Chunks 0, 1, 2, … pair with 2n - 1, 2n - 2, 2n - 3, …
    cut = (slice(None),) * axis
    if back:
        pairs = x.reshape(*before, num_ranks, 2, -1, *after)
        low, high = pairs[(*cut, slice(None), 0)], pairs[(*cut, slice(None), 1)]
        whole = jnp.concatenate([low, jnp.flip(high, axis)], axis)
    else:
        chunks = x.reshape(*before, parts, -1, *after)
        low, high = chunks[(*cut, slice(num_ranks))], chunks[(*cut, slice(num_ranks, None))]
        whole = jnp.stack([low, jnp.flip(high, axis)], axis + 1)
    return whole.reshape(x.shape)
