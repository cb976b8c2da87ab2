"""From contiguous keys and values to pages."""

import jax.numpy as jnp
import numpy as np


def paged(key, value, *, page_size: int, seed: int = 0, spare: int = 0):
    """`[B, S, K, H]` keys and values as shuffled pages, and the page table.

    `spare` pages belong to nobody.
    """
    B, S, K, H = key.shape
    per_row = -(-S // page_size)
    num_pages = B * per_row + spare
    order = np.random.default_rng(seed).permutation(num_pages)[: B * per_row]
    table = jnp.asarray(order.reshape(B, per_row), jnp.int32)

    def pages(x):
        x = jnp.pad(x, ((0, 0), (0, per_row * page_size - S), (0, 0), (0, 0)))
        x = x.reshape(B, per_row, page_size, K, H).swapaxes(2, 3)
        return jnp.zeros((num_pages, K, page_size, H), x.dtype).at[table].set(x)

    return pages(key), pages(value), table
