"""How keys and values lie in memory: the order of pages, KV heads and tokens.

`"PKpH"` is ours: the tokens of a head and page are neighbours. `"PpKH"` has the heads of a token
side by side, as a contiguous `[B, S, K, H]` cut into pages has. `"KPpH"` is that of JAX's
deprecated `paged_attention`.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

KVLayout = Literal["PKpH", "PpKH", "KPpH"]


def sizes(shape: tuple[int, ...], layout: KVLayout) -> tuple[int, int, int]:
    """P, K and p of a pool."""
    return shape[layout.index("P")], shape[layout.index("K")], shape[layout.index("p")]


def tokens_at(pages: Any, layout: KVLayout, *, page: Any, head: Any, tokens: Any) -> Any:
    """`[tokens, H]` of one page and head: a view of a reference, or of an array's `.at`."""
    where = {"P": page, "K": head, "p": tokens}
    return pages.at[tuple(where[axis] for axis in layout[:3])]


def as_ours(pages: jax.Array, layout: KVLayout) -> jax.Array:
    """`[P, K, p, H]`; a copy unless it is that already."""
    return pages.transpose(*(layout.index(axis) for axis in "PKpH"))


def cut(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cut a contiguous `[B, S, K, H]` into pages, without a copy.

    Returns:
        `[P, p, K, H]`, and the page table `[B, S/p]` int32. p is the largest of 128, 64, 32 and 16
        that divides S, else S.
    """
    B, S, K, H = keys.shape
    p = next((size for size in (128, 64, 32, 16) if S % size == 0), S)
    table = jnp.arange(B * (S // p), dtype=jnp.int32).reshape(B, S // p)
    return keys.reshape(-1, p, K, H), table
