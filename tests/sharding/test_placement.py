"""Which tokens a rank holds; plain arithmetic, on one device."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.sharding import count_before, padded_length, place, positions, unplace
from jaxinfer.sharding.sequence_parallel.layout import Layout
from jaxinfer.sharding.sequence_parallel.placement import PLACEMENTS

placements = st.sampled_from(PLACEMENTS)
ranks = st.integers(1, 9)


@settings(deadline=None, max_examples=12)
@given(placements, ranks, st.integers(1, 4))
def test_rank_order_and_positions_agree(placement, n, half):
    c = 2 * half
    placed = np.asarray(place(jnp.arange(n * c), placement, n, axis=0)).reshape(n, c)
    for rank in range(n):
        np.testing.assert_array_equal(positions(placement, rank, n, c), placed[rank])
    assert sorted(placed.ravel()) == list(range(n * c))
    assert (np.diff(placed, axis=1) > 0).all()


@settings(deadline=None, max_examples=12)
@given(placements, ranks, st.integers(1, 3), st.integers(0, 2))
def test_unplace_undoes_place(placement, n, half, axis):
    shape = [3, 2, 2]
    shape[axis] = 2 * half * n
    x = jnp.arange(np.prod(shape)).reshape(shape)
    for one, other in ((place, unplace), (unplace, place)):
        moved = one(x, placement, n, axis=axis)
        np.testing.assert_array_equal(other(moved, placement, n, axis=axis), x)
        np.testing.assert_array_equal(
            one(x, placement, n, axis=axis - 3), moved, err_msg="negative axis"
        )


@settings(deadline=None, max_examples=12)
@given(placements, ranks, st.integers(1, 3))
def test_counts_are_those_of_the_positions(placement, n, half):
    c = 2 * half
    limits = jnp.arange(n * c + 2)
    for rank in range(n):
        held = np.asarray(positions(placement, rank, n, c))
        got = count_before(limits, placement, rank, n, c)
        np.testing.assert_array_equal(got, (held < np.asarray(limits)[:, None]).sum(axis=1))


@settings(deadline=None, max_examples=12)
@given(placements, st.integers(1, 5), st.integers(1, 4), st.data())
def test_pieces_hold_the_tokens_that_part_lengths_count(placement, n, m, data):
    """Cut positions themselves: what lies before a length is what is counted."""
    layout = Layout(placement=placement, num_ranks=n, pieces=m,
                    tokens_per_rank=2 * m * data.draw(st.integers(1, 2)))  # fmt: skip
    total = n * layout.tokens_per_rank
    length = data.draw(st.integers(0, total))
    for rank in range(n):
        held = positions(placement, rank, n, layout.tokens_per_rank)[None, :, None, None]
        pieces = np.asarray(layout.cut(held, held))[:, 0, 0, :, :, 0, 0]
        assert pieces.shape == (m, layout.chunks, layout.part_tokens)
        for chunk in range(layout.chunks):
            got = layout.part_lengths(
                jnp.full(m, rank), jnp.arange(m), chunk, jnp.array([length, total]), 2
            )
            np.testing.assert_array_equal(got[0], (pieces[:, chunk] < length).sum(axis=1))
            assert (np.asarray(got[1]) == layout.part_tokens).all()


def test_zigzag_is_even_and_contiguous_is_not():
    """Cells of the causal mask that a rank computes."""
    work = {p: [int(positions(p, r, 4, 6).sum()) for r in range(4)] for p in PLACEMENTS}
    assert len(set(work["zigzag"])) == 1
    assert max(work["striped"]) - min(work["striped"]) <= 3 * 6
    assert work["contiguous"] == sorted(work["contiguous"])


@pytest.mark.parametrize(("length", "placement", "pieces", "want"), [
    (100, "contiguous", 1, 104), (104, "contiguous", 1, 104), (1, "zigzag", 7, 112),
    (113, "striped", 7, 168), (0, "zigzag", 1, 0),
])  # fmt: skip
def test_padded_length(length, placement, pieces, want):
    assert padded_length(length, 8, placement, pieces) == want


def test_errors_say_what_to_do(unchecked):
    with pytest.raises(ValueError, match=r"multiple of 8 tokens; got 9: pad to 16"):
        place(jnp.arange(9), "zigzag", 4, axis=0)
    with pytest.raises(ValueError, match="even number of tokens per rank; got 3"):
        positions("zigzag", 0, 2, 3)
    with pytest.raises(ValueError, match="did you mean 'striped'"):
        padded_length(8, 2, "stripe")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"multiple of 14 .* got 20: pad the sequence to 224"):
        Layout(placement="zigzag", num_ranks=8, tokens_per_rank=20, pieces=7)
