"""The division of work: every unit once, every piece its own place."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxinfer.pallas_kernels.decode_attention.plan import Division, num_groups
from tests.ops.cases import quick_compilation

BLOCK = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """Lengths, and what is static about a call."""

    lengths: tuple[int, ...]
    groups: int
    tokens: int = 1
    window: int | None = None

    @property
    def division(self) -> Division:
        return Division(
            B=len(self.lengths), T=self.tokens, block=BLOCK, groups=self.groups,
            left_window=self.window,
        )  # fmt: skip

    def visible_blocks(self, request: int) -> list[int]:
        """Blocks with a key that some query of a request sees, one key at a time."""
        length = self.lengths[request]
        oldest = max(length - self.tokens - self.window, 0) if self.window is not None else 0
        return sorted({key // BLOCK for key in range(oldest, length)})


@functools.cache
def compiled(division: Division, blocks: int):
    """Starts of all groups, and the unit after every (request, block)."""

    def compute(lengths):
        groups = jnp.arange(division.groups, dtype=jnp.int32)
        pairs = jnp.indices((division.B, blocks), dtype=jnp.int32).reshape(2, -1)
        starts = jax.vmap(lambda group: division.start(lengths, group))(groups)
        after = jax.vmap(lambda *unit: division.following(lengths, *unit))(*pairs)
        return starts, after

    lengths = jax.ShapeDtypeStruct((division.B,), jnp.int32)
    with quick_compilation():
        return jax.jit(compute).lower(lengths).compile()


def check(call: Call) -> list[int]:
    """Walk as the kernels do; the units of every group."""
    B = len(call.lengths)
    blocks = (max(call.lengths) // BLOCK // 10 + 1) * 10  # more than there are, and few numbers
    arrays = compiled(call.division, blocks)(jnp.array(call.lengths, jnp.int32))
    starts, after = jax.tree.map(np.asarray, arrays)
    assert all(x.dtype == np.int32 for part in (starts, after) for x in part)

    per_group = []
    firsts = {}  # what a kernel notes as it comes to a request's first unit
    for request, block, count, unit, _ in zip(*starts, strict=True):
        units = []
        for i in range(count):
            if block == call.visible_blocks(request)[0]:
                firsts[request] = unit + i
            units.append((int(request), int(block)))
            place = request * blocks + block
            request, block = after[0][place], after[1][place]
        per_group.append(units)
    expected = [(b, block) for b in range(B) for block in call.visible_blocks(b)]
    assert [unit for units in per_group for unit in units] == expected
    share = max(-(-len(expected) // call.groups), 1)
    assert all(len(units) <= share for units in per_group)  # nobody does more than a fair share

    owned: dict[int, set[int]] = {b: set() for b in range(B)}
    for group, units in enumerate(per_group):
        for request, _ in units:
            owned[request].add(group + request)
    numbers = [number for pieces in owned.values() for number in pieces]
    assert len(numbers) == len(set(numbers))
    assert max(numbers, default=0) < call.division.pieces
    assert all(starts.share == share)
    for b, length in enumerate(call.lengths):
        first, count = call.division.pieces_of(
            jnp.int32(b), jnp.int32(length), first_unit=jnp.int32(firsts.get(b, 77)),
            share=jnp.int32(share),
        )  # fmt: skip
        assert sorted(owned[b]) == list(range(first, first + count)), b
    return [len(units) for units in per_group]


calls = st.builds(
    Call,
    lengths=st.lists(st.sampled_from([0, 1, 63, 64, 65, 200, 512]), min_size=1, max_size=4).map(
        tuple
    ),
    groups=st.sampled_from([1, 2, 3, 7, 132]),
    tokens=st.sampled_from([1, 8]),
    window=st.sampled_from([None, 0, 63, 100]),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(calls)
@example(Call(lengths=(1,), groups=132))
@example(Call(lengths=(0, 0, 0), groups=3))
@example(Call(lengths=(0, 70, 0, 0), groups=2))
def test_every_unit_is_done_once_and_every_piece_has_its_place(call):
    check(call)


@pytest.mark.parametrize("window", [0, 1, 62, 63, 64, 65, 127, 128, 10_000])
def test_windows_around_the_block_size(window):
    for length in (1, 64, 129, 192, 200):
        check(Call(lengths=(length, 7), groups=3, tokens=2, window=window))


@pytest.mark.parametrize("B", [64, 65, 200], ids=["unrolled", "looped", "many"])
def test_many_requests_on_a_whole_gpu(B):
    """The slowest group does at most one unit more than the mean."""
    lengths = tuple(int(x) for x in np.random.default_rng(0).integers(0, 1500, B))
    counts = check(Call(lengths=lengths, groups=num_groups(num_ctas=132, num_kv_heads=8)))
    assert len(counts) == 16
    assert max(counts) <= sum(counts) / 16 + 1


def test_more_heads_than_ctas():
    assert num_groups(num_ctas=3, num_kv_heads=8) == 1
