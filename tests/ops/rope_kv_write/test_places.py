"""Where tokens of a paged cache go."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.pallas_kernels.rope_kv_write.places import NOWHERE, place, places

LEAST, LARGEST = np.iinfo(np.int32).min, np.iinfo(np.int32).max


@pytest.mark.parametrize("page_size", [1, 7, 16])
def test_all_positions_around_a_table(page_size):
    """Against the same in plain Python; columns that are looked up are always the table's."""
    table, num_pages = np.array([4, -1, 0, 5, 9], np.int32), 5
    position = np.arange(-3 * page_size, 9 * page_size, dtype=np.int32)
    position = np.concatenate([position, np.array([LEAST, LEAST + 1, LARGEST], np.int32)])
    asked = []

    def page_of(column):
        asked.append(np.asarray(column))
        return jnp.asarray(table)[column]

    page, slot = place(
        jnp.asarray(position), position % 5 != 3, page_of,
        page_size=page_size, table_width=len(table), num_pages=num_pages,
    )  # fmt: skip
    assert (asked[0] >= 0).all()
    assert (asked[0] < len(table)).all()
    for at, got, where in zip(position.tolist(), page.tolist(), slot.tolist(), strict=True):
        column = at // page_size
        entry = int(table[column]) if 0 <= column < len(table) else NOWHERE
        exists = at % 5 != 3 and 0 <= entry < num_pages
        assert got == (entry if exists else NOWHERE), at
        assert not exists or where == at % page_size, at


def test_positions_beyond_all_integers_are_no_places():
    """The largest start, and a token more: the sum is negative."""
    table, pages = jnp.zeros((2, 2), jnp.int32), jnp.zeros((1, 1, 16, 2))
    start = jnp.array([LARGEST, 30], jnp.int32)
    page, slot = places(table, start, jnp.array([4, 4]), T=4, pages=pages)
    np.testing.assert_array_equal(page, [[NOWHERE] * 4, [0, 0, NOWHERE, NOWHERE]])
    np.testing.assert_array_equal(slot[1, :2], [14, 15])
