"""From pages to a contiguous sequence."""

import jax.numpy as jnp
from jaxtyping import Array, Int, Num


def gather_pages(
    pages: Num[Array, "P K p H"], page_table: Int[Array, "B M"]
) -> Num[Array, "B S K H"]:
    """Copy the pages of every row into one sequence of S = M·p tokens."""
    _, K, p, H = pages.shape
    B, M = page_table.shape
    gathered = jnp.asarray(pages).at[page_table].get(mode="clip")  # [B, M, K, p, H]
    return gathered.transpose(0, 1, 3, 2, 4).reshape(B, M * p, K, H)
