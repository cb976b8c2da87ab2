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


def poison(k_pages, v_pages, page_table, lengths):
    """NaN in every slot that no row uses, and table entries past the lengths that are no pages."""
    page_size = k_pages.shape[2]
    slots = np.arange(page_table.shape[1] * page_size).reshape(page_table.shape[1], page_size)
    used = np.zeros((len(k_pages), page_size), bool)
    used[np.asarray(page_table)] = slots < np.asarray(lengths)[:, None, None]
    k_pages, v_pages = (jnp.where(used[:, None, :, None], x, jnp.nan) for x in (k_pages, v_pages))
    return k_pages, v_pages, jnp.where(slots[:, 0] < lengths[:, None], page_table, 10_000)
