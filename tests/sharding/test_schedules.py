"""Every kind of schedule is exact, for every number of ranks up to 64."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.sharding import Schedule, build
from jaxinfer.sharding.hamilton import hamiltonian_cycles, has_decomposition
from jaxinfer.sharding.hamilton_even import even_cycles
from jaxinfer.sharding.multinode import hamiltonian_paths
from jaxinfer.sharding.xor import POLYNOMIALS, field_multiply

RANKS = range(2, 65)
DECOMPOSABLE = [n for n in RANKS if n not in (4, 6)]
POWERS = [2, 4, 8, 16, 32, 64]
NODES = [(g, u) for g in (1, 2, 4, 6, 7, 8, 16) for u in (2, 3, 4) if g * u <= 64]


def walk(schedule: Schedule) -> None:
    """Move the pieces one by one with plain sets; an oracle that shares nothing with validate."""
    n = schedule.num_ranks
    own = [{p for p, owner in enumerate(schedule.owner) if owner == r} for r in range(n)]
    seen = [set(pieces) for pieces in own]
    current: list[set[int]] = [set() for _ in range(n)]
    for step in range(schedule.num_steps):
        used: set[tuple[int, int]] = set()
        arriving: list[set[int]] = [set() for _ in range(n)]
        for rank in range(n):
            for lane in range(schedule.num_lanes):
                to = int(schedule.destination[step, rank, lane])
                piece = int(schedule.piece[step, rank, lane])
                assert (rank, to) not in used
                assert piece in own[rank] | current[rank]
                assert piece not in seen[to]
                used.add((rank, to))
                seen[to].add(piece)
                arriving[to].add(piece)
        current = arriving
    assert all(pieces == set(range(schedule.num_pieces)) for pieces in seen)
    assert all(len(pieces) == schedule.pieces_per_rank for pieces in own)


@pytest.mark.parametrize("kind", ["ring", "full_link", "all_gather"])
def test_kinds_for_every_n(kind: str):
    for n in RANKS:
        schedule = build(kind, n)
        schedule.validate()
        assert schedule.num_steps == n - 1
        assert schedule.num_lanes == (1 if kind == "ring" else n - 1)
        assert schedule.link_share == pytest.approx(1 / (n - 1) if kind == "ring" else 1)


def test_hamilton_for_every_n_that_has_one():
    for n in DECOMPOSABLE:
        schedule = build("hamilton", n)
        schedule.validate()
        assert schedule.has_fixed_links
        assert schedule.keeps_lanes
        assert schedule.link_share == 1


def test_xor_for_powers_of_two():
    for n in POWERS:
        schedule = build("xor", n)
        schedule.validate()
        assert schedule.keeps_lanes
        assert schedule.link_share == 1
        # Every lane exchanges between pairs.
        back = np.take_along_axis(schedule.destination, schedule.destination.astype(int), axis=1)
        assert (back == np.arange(n)[:, None]).all()


@pytest.mark.parametrize(("per_node", "nodes"), NODES)
def test_multinode_uses_each_card_once_and_each_local_link(per_node: int, nodes: int):
    schedule = build("multinode", per_node * nodes, ranks_per_node=per_node)
    schedule.validate()
    sender = np.arange(per_node * nodes)[:, None] // per_node
    for destination in schedule.destination:
        leaves = destination // per_node != sender
        assert (leaves.sum(axis=1) == 1).all()
        assert (np.bincount(destination[leaves]) == 1).all()
        assert (~leaves).sum() == nodes * per_node * (per_node - 1)


@pytest.mark.parametrize(("n", "pieces"), [(2, 5), (3, 1), (4, 3), (6, 14), (8, 3), (9, 8)])
def test_all_gather_takes_any_number_of_pieces(n: int, pieces: int):
    schedule = build("all_gather", n, pieces=pieces)
    schedule.validate()
    walk(schedule)
    assert schedule.num_steps == pieces
    assert schedule.is_direct


@pytest.mark.parametrize("kind", ["ring", "hamilton", "full_link", "xor", "all_gather"])
def test_against_plain_walk(kind: str):
    for n in range(2, 13):
        if (kind == "hamilton" and n in (4, 6)) or (kind == "xor" and n not in POWERS):
            continue
        walk(build(kind, n))


def test_multinode_against_plain_walk():
    for per_node, nodes in [(1, 3), (2, 2), (4, 3), (8, 2)]:
        walk(build("multinode", per_node * nodes, ranks_per_node=per_node))


@pytest.mark.parametrize("kind", ["ring", "all_gather"])
def test_one_rank_has_nothing_to_send(kind: str):
    schedule = build(kind, 1)
    schedule.validate()
    assert schedule.num_steps == 0


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 400).filter(has_decomposition))
def test_decomposition_beyond_64(n: int):
    cycles = hamiltonian_cycles(n)
    assert cycles.shape == (n - 1, n)
    assert (np.sort(cycles, axis=1) == np.arange(n)).all()
    arcs = cycles.astype(int) * n + np.roll(cycles, -1, axis=1)
    assert len(np.unique(arcs)) == n * (n - 1)


def test_even_decompositions_up_to_256():
    # Beyond the rows themselves all depends on the last cycle: the broken arcs must be a path.
    for n in range(66, 258, 2):
        last = even_cycles(n)[-1]
        assert sorted(last) == list(range(n))


def test_paths_start_and_end_once_at_each_rank():
    for g in (1, 2, 4, 6, 7, 8, 9, 10, 12):
        paths = hamiltonian_paths(g)
        assert sorted(paths[:, 0]) == sorted(paths[:, -1]) == list(range(g))
        arcs = {(int(a), int(b)) for path in paths for a, b in itertools.pairwise(path)}
        assert len(arcs) == g * (g - 1)


@pytest.mark.parametrize("degree", sorted(POLYNOMIALS))
def test_field_has_no_zero_divisors(degree: int):
    # True exactly if the polynomial is irreducible; then each product with a permutes the ranks.
    elements = np.arange(1, 2**degree)
    product = field_multiply(elements[:, None], elements, degree)
    assert product.min() > 0
    assert product.max() < 2**degree
    assert (product[0] == elements).all()


def test_arrivals_and_routes_agree():
    schedule = build("full_link", 6)
    routes, arrivals = schedule.routes(), schedule.arrivals()
    for step in range(schedule.num_steps):
        for rank in range(6):
            assert set(arrivals[step, rank]) == set(np.flatnonzero(routes[:, step + 1] == rank))


def test_own_pieces_are_grouped_by_owner():
    schedule = build("full_link", 4)
    own = schedule.own_pieces()
    assert (schedule.owner[own] == np.arange(4)[:, None]).all()


def test_broadcast_has_no_routes():
    with pytest.raises(ValueError, match="broadcasts"):
        build("all_gather", 3).routes()
