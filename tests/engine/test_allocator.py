"""The page allocator against a model of it: no page is lost, held twice, or out of order."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from jaxinfer.engine.allocator import PageAllocator, pages_for

OWNERS = st.sampled_from("abcd")


def test_pages_for_rounds_up():
    assert [pages_for(n, 16) for n in (0, 1, 16, 17, 32)] == [0, 1, 1, 2, 2]


def test_grows_in_whole_pages_and_keeps_what_is_there():
    pages = PageAllocator(num_pages=4, page_size=16)
    assert pages.grow("a", num_tokens=1)
    first = list(pages.owned("a"))
    assert pages.grow("a", num_tokens=16)
    assert pages.owned("a") == first
    assert pages.grow("a", num_tokens=33)
    assert pages.owned("a")[:1] == first
    assert len(pages.owned("a")) == 3
    assert pages.missing("a", num_tokens=64) == 1
    # A shorter sequence takes nothing back.
    assert pages.grow("a", num_tokens=1)
    assert len(pages.owned("a")) == 3


def test_refuses_all_or_nothing():
    pages = PageAllocator(num_pages=3, page_size=16)
    assert pages.grow("a", num_tokens=32)
    assert not pages.grow("b", num_tokens=17)
    assert pages.owned("b") == []
    assert pages.owners == {"a"}
    assert pages.num_free == 1
    assert pages.grow("b", num_tokens=16)
    assert pages.num_free == 0


def test_release_twice_is_nothing():
    pages = PageAllocator(num_pages=2, page_size=16)
    pages.grow("a", num_tokens=32)
    pages.release("a")
    pages.release("a")
    pages.release("never seen")
    assert pages.num_free == 2
    pages.check_invariants()


@pytest.mark.parametrize("sizes", [(0, 16), (4, 0), (-1, 16)])
def test_sizes_must_be_positive(sizes):
    with pytest.raises(ValueError, match="must be positive; got"):
        PageAllocator(num_pages=sizes[0], page_size=sizes[1])


@pytest.mark.parametrize(
    "damage",
    [
        lambda pages: pages.owned("b").append(pages.owned("a")[0]),  # held twice
        lambda pages: pages.owned("a").pop(),  # lost
        lambda pages: pages._free.append(pages._free[0]),  # free twice
        lambda pages: pages._free.append(99),  # does not exist
    ],
)
def test_invariants_see_damage(damage):
    pages = PageAllocator(num_pages=5, page_size=16)
    pages.grow("a", num_tokens=20)
    pages.grow("b", num_tokens=20)
    pages.check_invariants()
    damage(pages)
    with pytest.raises(AssertionError, match="page pool is inconsistent"):
        pages.check_invariants()


class Pool(RuleBasedStateMachine):
    """Any sequence of calls; `tokens` is the longest sequence that each owner was given."""

    def __init__(self):
        super().__init__()
        self.pages = PageAllocator(num_pages=9, page_size=4)
        self.tokens: dict[str, int] = {}
        self.order: dict[str, list[int]] = {}

    @rule(owner=OWNERS, num_tokens=st.integers(0, 44))
    def grow(self, owner: str, num_tokens: int):
        before = dict(self.tokens)
        longest = max(before.get(owner, 0), num_tokens)
        wanted = sum(pages_for(n, 4) for n in (before | {owner: longest}).values())
        assert self.pages.grow(owner, num_tokens=num_tokens) == (wanted <= 9)
        if wanted <= 9:
            self.tokens[owner] = longest
            known = self.order.get(owner, [])
            assert self.pages.owned(owner)[: len(known)] == known
            self.order[owner] = list(self.pages.owned(owner))

    @rule(owner=OWNERS)
    def release(self, owner: str):
        self.pages.release(owner)
        self.tokens.pop(owner, None)
        self.order.pop(owner, None)

    @invariant()
    def consistent(self):
        self.pages.check_invariants()
        for owner in "abcd":
            assert len(self.pages.owned(owner)) == pages_for(self.tokens.get(owner, 0), 4)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
