"""How heads are divided: each is computed once, beside the KV head that it needs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.models.parallel.heads import divide_heads


@given(
    num_kv_heads=st.integers(1, 12), group=st.integers(1, 12), size=st.integers(1, 16)
)  # fmt: skip
def test_every_query_head_is_somewhere_once_with_its_kv_head(num_kv_heads, group, size):
    num_heads = num_kv_heads * group
    division = divide_heads(num_heads, num_kv_heads, size)
    queries, kv = np.array(division.queries), np.array(division.kv)
    assert queries.shape == (size, division.num_heads)
    assert kv.shape == (size, division.num_kv_heads)
    assert sorted(queries[queries >= 0]) == list(range(num_heads))
    assert set(kv[kv >= 0]) == set(range(num_kv_heads))
    local_group = division.num_heads // division.num_kv_heads
    assert local_group * division.num_kv_heads == division.num_heads
    beside = np.repeat(kv, local_group, axis=1)
    assert (beside[queries >= 0] == queries[queries >= 0] // group).all()


@given(
    num_kv_heads=st.integers(1, 12), group=st.integers(1, 12), size=st.integers(1, 16)
)  # fmt: skip
def test_what_divides_evenly_is_divided_evenly(num_kv_heads, group, size):
    """Without padding, and with no more copies than there must be."""
    division = divide_heads(num_kv_heads * size * group, num_kv_heads * size, size)
    assert (division.num_heads, division.num_kv_heads) == (num_kv_heads * group, num_kv_heads)
    shared = divide_heads(num_kv_heads * size * group, num_kv_heads, num_kv_heads * size)
    assert (shared.num_heads, shared.num_kv_heads) == (group, 1)


@pytest.mark.parametrize(
    ("heads", "size", "per_device"),
    [
        ((9, 3), 2, (6, 2)),  # SmolLM2: one KV head and its group are padding
        ((9, 3), 4, (3, 1)),  # the last device has padding only
        ((14, 2), 4, (4, 1)),  # Qwen2.5-0.5B: groups of 7 are halved and padded
        ((4, 1), 4, (1, 1)),  # Gemma 3 270M
        ((32, 8), 16, (2, 1)),
        ((32, 32), 3, (11, 11)),
    ],
)
def test_heads_of_a_device(heads, size, per_device):
    division = divide_heads(*heads, size)
    assert (division.num_heads, division.num_kv_heads) == per_device
