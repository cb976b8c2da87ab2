"""Which request owns which pages of the KV cache."""

from collections.abc import Hashable, Sequence, Set


def pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that a sequence of `num_tokens` occupies."""
    return -(-num_tokens // page_size)


class PageAllocator:
    """A free list of pages, and the pages of every owner in order.

    >>> pages = PageAllocator(num_pages=4, page_size=16)
    >>> pages.grow("a", num_tokens=20)
    True
    >>> len(pages.owned("a")), pages.num_free
    (2, 2)
    >>> pages.release("a")
    >>> pages.num_free
    4
    """

    def __init__(self, *, num_pages: int, page_size: int):
        """Make a pool in which every page is free.

        Raises:
            ValueError: a size that is not positive.
        """
        if num_pages < 1 or page_size < 1:
            raise ValueError(
                f"num_pages and page_size must be positive; got {num_pages} and {page_size}"
            )
        self.num_pages, self.page_size = num_pages, page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._owned: dict[Hashable, list[int]] = {}

    @property
    def num_free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    @property
    def owners(self) -> Set[Hashable]:
        """Who holds pages."""
        return self._owned.keys()

    def pages_for(self, num_tokens: int) -> int:
        """Pages that a sequence of this length occupies."""
        return pages_for(num_tokens, self.page_size)

    def owned(self, owner: Hashable) -> list[int]:
        """The owner's pages, in the order of its tokens."""
        return self._owned.get(owner, [])

    def missing(self, owner: Hashable, *, num_tokens: int) -> int:
        """Pages that the owner lacks for a sequence of this length."""
        return max(self.pages_for(num_tokens) - len(self.owned(owner)), 0)

    def grow(self, owner: Hashable, *, num_tokens: int) -> bool:
        """Give the owner pages for this many tokens in all; False, and none, if too few."""
        missing = self.missing(owner, num_tokens=num_tokens)
        if missing > len(self._free):
            return False
        if missing:
            pages = self._owned.setdefault(owner, [])
            pages.extend(self._free.pop() for _ in range(missing))
        return True

    def release(self, owner: Hashable) -> None:
        """Take back all pages of an owner; nothing happens if it has none."""
        self._free.extend(reversed(self._owned.pop(owner, [])))

    def check_invariants(self) -> None:
        """Every page is free or owned, once.

        Raises:
            AssertionError: a page is lost or held twice: a defect of the engine.
        """
        held = [page for pages in self._owned.values() for page in pages] + self._free
        if sorted(held) != list(range(self.num_pages)):
            raise AssertionError(
                f"page pool is inconsistent: {len(held)} pages held, "
                f"{len(set(held))} different, {self.num_pages} exist"
            )

    def check_table(self, owner: Hashable, table: Sequence[int], *, num_tokens: int) -> None:
        """What the device is told of an owner: its own pages in order, enough for its tokens.

        Args:
            owner: Who computes.
            table: The page numbers that the device has.
            num_tokens: How many tokens lengths will reach.

        Raises:
            AssertionError: a request would read or write what is not its own: a defect of the
                engine.
        """
        owned = self.owned(owner)
        for entry, page in enumerate(table):
            if not 0 <= page < self.num_pages:
                raise AssertionError(
                    f"page_table must name pages 0 … {self.num_pages - 1}; "
                    f"got {page} in entry {entry}"
                )
            if entry >= len(owned) or page != owned[entry]:
                raise AssertionError(
                    f"page_table names page {page} in entry {entry}, which is not its request's"
                )
        room = len(table) * self.page_size
        if num_tokens > room:
            raise AssertionError(
                f"lengths reach {num_tokens} tokens where page_table has room for {room}"
            )
