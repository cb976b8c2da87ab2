"""The division of work: every unit once, every piece its own place."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxinfer.pallas_kernels.decode_attention.plan import num_pieces, plan_decode

BLOCK = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """Arguments of one plan."""

    lengths: tuple[int, ...]
    heads: int
    ctas: int
    tokens: int = 1
    window: int | None = None

    def plan(self):
        """The plan, as NumPy arrays by field name."""
        plan = plan_decode(
            jnp.array(self.lengths, jnp.int32), num_tokens=self.tokens, num_kv_heads=self.heads,
            block=BLOCK, num_ctas=self.ctas, left_window=self.window,
        )  # fmt: skip
        arrays = {name: np.asarray(value) for name, value in vars_of(plan).items()}
        assert all(value.dtype == np.int32 for value in arrays.values())
        return arrays

    def visible_blocks(self, request: int) -> list[int]:
        """Blocks with a key that some query of a request sees, one key at a time."""
        length = self.lengths[request]
        oldest = max(length - self.tokens - self.window, 0) if self.window is not None else 0
        return sorted({key // BLOCK for key in range(oldest, length)})


def vars_of(plan) -> dict:
    return {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}


def walk(plan, cta: int) -> list[tuple[int, int, int]]:
    """Units (head, request, block) of a CTA, found as the kernel finds them."""
    head, request, block, count = (int(x) for x in plan["starts"][cta])
    units = []
    end = plan["end_block"][request]
    for _ in range(count):
        units.append((head, request, block))
        block += 1
        if block >= end:
            following = int(plan["next_request"][request])
            head += following <= request
            request, block = following, int(plan["first_block"][following])
            end = plan["end_block"][request]
    return units


def check(call: Call) -> None:
    plan = call.plan()
    B = len(call.lengths)
    expected = [
        (head, request, block)
        for head in range(call.heads)
        for request in range(B)
        for block in call.visible_blocks(request)
    ]
    per_cta = [walk(plan, cta) for cta in range(call.ctas)]
    assert [unit for units in per_cta for unit in units] == expected

    share = int(plan["share"][0])
    assert share == max(-(-len(expected) // call.ctas), 1)  # nobody does more than a fair share
    assert all(len(units) <= share for units in per_cta)

    pieces: dict[int, set[int]] = {}
    for cta, units in enumerate(per_cta):
        for head, request, _ in units:
            segment = head * B + request
            pieces.setdefault(segment, set()).add(cta + segment)
    indices = [index for owned in pieces.values() for index in owned]
    assert len(indices) == len(set(indices))
    assert max(indices, default=0) < num_pieces(
        batch=B, num_kv_heads=call.heads, num_ctas=call.ctas
    )
    for segment, owned in pieces.items():
        assert sorted(owned) == list(merge_range(plan, segment, B)), segment


def merge_range(plan, segment: int, B: int) -> range:
    """Pieces of a segment, as the merge finds them: neighbours, in order."""
    head, request = divmod(segment, B)
    before, share = plan["before"], int(plan["share"][0])
    first_unit = head * int(before[B]) + int(before[request])
    last_unit = first_unit + int(before[request + 1] - before[request]) - 1
    return range(first_unit // share + segment, last_unit // share + segment + 1)


calls = st.builds(
    Call,
    lengths=st.lists(st.sampled_from([0, 1, 63, 64, 65, 200, 512]), min_size=1, max_size=4).map(
        tuple
    ),
    heads=st.integers(1, 3),
    ctas=st.sampled_from([1, 2, 3, 7, 132]),
    tokens=st.sampled_from([1, 8]),
    window=st.sampled_from([None, 0, 63, 100]),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(calls)
@example(Call(lengths=(1,), heads=1, ctas=132))
@example(Call(lengths=(0, 0, 0), heads=2, ctas=3))
@example(Call(lengths=(0, 70, 0, 0), heads=3, ctas=2))
def test_every_unit_is_done_once_and_every_piece_has_its_place(call):
    check(call)


@pytest.mark.parametrize("window", [0, 1, 62, 63, 64, 65, 127, 128, 10_000])
def test_windows_around_the_block_size(window):
    for length in (1, 64, 129, 192, 200):
        check(Call(lengths=(length, 7), heads=2, ctas=3, tokens=2, window=window))


def test_many_requests_on_a_whole_gpu():
    """132 CTAs, 64 ragged requests: the slowest CTA does at most one unit more than the mean."""
    lengths = tuple(int(x) for x in np.random.default_rng(0).integers(1, 1500, 64))
    call = Call(lengths=lengths, heads=8, ctas=132)
    check(call)
    counts = call.plan()["starts"][:, 3]
    assert counts.max() <= counts.sum() / 132 + 1
