"""Where a token goes in a paged cache, or that it goes nowhere: one rule for all that write."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

NOWHERE = -1  # page of a token that is not written


def place(
    position: Any, is_token: Any, page_of: Callable[[Any], Any],
    *, page_size: int, table_width: int, num_pages: int,
) -> tuple[Any, Any]:  # fmt: skip
    """Page and slot of a token, or of tokens alike; page `NOWHERE`, and any slot, if it has none.

    It has none if it is no token, its position lies outside the table, or its entry names no page.

    Args:
        position: int32, in the sequence.
        is_token: Whether there is one.
        page_of: The int32 table entry in a column, which is always one of the table's.
        page_size: p.
        table_width: M.
        num_pages: P.
    """
    size = jnp.int32(page_size)
    column = lax.div(position, size)  # towards 0: those before the table are told by their sign
    inside = is_token & (position >= 0) & (column < table_width)
    page = page_of(jnp.where(inside, column, 0))
    exists = inside & (page >= 0) & (page < num_pages)
    return jnp.where(exists, page, NOWHERE), lax.rem(position, size)


def places(
    page_table: jax.Array, start: jax.Array, num_tokens: jax.Array, *, T: int, pages: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`[B, T]` page and slot of all tokens of a call; see `place`.

    Args:
        page_table: `[B, M]` int32.
        start: `[B]` int32.
        num_tokens: `[B]`.
        T: Tokens of a row, real or not.
        pages: A pool `[P, K, p, H]`.
    """
    token = jnp.arange(T, dtype=jnp.int32)
    return place(
        start[:, None] + token,
        token < num_tokens[:, None],
        lambda column: jnp.take_along_axis(page_table, column, axis=1),
        page_size=pages.shape[2], table_width=page_table.shape[1], num_pages=pages.shape[0],
    )  # fmt: skip
