"""Four and six ranks have no Hamiltonian decomposition: an exhaustive search finds none."""

import itertools

import pytest


def count_decompositions(n: int, limit: int | None = None) -> int:
    """Count the ways to split the complete directed graph into Hamiltonian cycles.

    Exact cover of the n(n - 1) arcs by the (n - 1)! cycles: take the first arc not yet used and
    try every cycle that contains it and none of the used ones. Nothing is assumed by symmetry.

    Args:
        n: Vertices.
        limit: Stop at this many; None: search everything.

    Returns:
        Number of decompositions.
    """
    bit = {arc: 1 << i for i, arc in enumerate(itertools.permutations(range(n), 2))}
    cycles = []
    for rest in itertools.permutations(range(1, n)):
        order = (0, *rest)
        cycles.append(sum(bit[arc] for arc in zip(order, (*rest, 0), strict=True)))
    full = (1 << len(bit)) - 1
    containing = [[c for c in cycles if c >> i & 1] for i in range(len(bit))]
    found = 0

    def search(used: int) -> None:
        nonlocal found
        if used == full:
            found += 1
            return
        first = (~used & (used + 1)).bit_length() - 1
        for cycle in containing[first]:
            if limit is not None and found >= limit:
                return
            if not cycle & used:
                search(used | cycle)

    search(0)
    return found


def all_choices(n: int) -> int:
    """The same count without pruning: every set of n - 1 cycles."""
    arcs = []
    for rest in itertools.permutations(range(1, n)):
        order = (0, *rest)
        arcs.append(frozenset(zip(order, (*rest, 0), strict=True)))
    chosen = itertools.combinations(arcs, n - 1)
    return sum(len(frozenset().union(*cycles)) == n * (n - 1) for cycles in chosen)


@pytest.mark.parametrize("n", [4, 6])
def test_none_exists(n: int):
    assert count_decompositions(n) == 0


@pytest.mark.parametrize("n", [3, 4, 5])
def test_the_pruned_search_counts_what_an_unpruned_one_counts(n: int):
    assert count_decompositions(n) == all_choices(n)


@pytest.mark.parametrize("n", [2, 3, 5, 7])
def test_the_same_search_finds_those_that_exist(n: int):
    assert count_decompositions(n, limit=1) == 1
