"""Wrong schedules are refused with the reason, and wrong arguments by name."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.sharding import KINDS, Schedule, build
from jaxinfer.sharding.checks import at_least, positive


def changed(schedule: Schedule, field: str, index: tuple[int, ...], value: int) -> Schedule:
    array = getattr(schedule, field).copy()
    array[index] = value
    return dataclasses.replace(schedule, **{field: array})


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_single_wrong_entry_is_refused(data: st.DataObject):
    kind = data.draw(st.sampled_from(["ring", "hamilton", "xor", "full_link", "all_gather"]))
    schedule = build(kind, 8)
    field = data.draw(st.sampled_from(["owner", "destination", "piece"]))
    array = getattr(schedule, field)
    index = tuple(data.draw(st.integers(0, size - 1)) for size in array.shape)
    limit = schedule.num_pieces if field == "piece" else 8
    value = data.draw(st.integers(0, limit - 1).filter(lambda v: v != array[index]))
    with pytest.raises(ValueError, match=r"rank|piece|step"):
        changed(schedule, field, index, value).validate()


def test_link_used_twice():
    schedule = build("all_gather", 4)
    destination = schedule.destination.copy()
    destination[1, :, 1] = destination[1, :, 0]
    with pytest.raises(ValueError, match=r"step 1: link 0->1 carries more than one piece"):
        dataclasses.replace(schedule, destination=destination).validate()


def test_rank_receives_two_pieces_in_one_lane():
    with pytest.raises(ValueError, match=r"step 0, lane 0: some rank receives more than one"):
        changed(build("ring", 3), "destination", (0, 0, 0), 2).validate()


def test_rank_sends_to_itself():
    schedule = build("ring", 2)
    destination = np.array([[[0], [1]]])
    with pytest.raises(ValueError, match=r"step 0, lane 0: rank 0 sends to itself"):
        dataclasses.replace(schedule, destination=destination).validate()


def test_piece_that_the_sender_does_not_hold():
    with pytest.raises(ValueError, match=r"step 0: rank 0 sends piece 2, which it neither"):
        changed(build("ring", 3), "piece", (0, 0, 0), 2).validate()


def test_piece_received_two_steps_ago_is_gone():
    schedule = build("hamilton", 5)
    piece = schedule.piece.copy()
    piece[2] = schedule.piece[1]
    with pytest.raises(ValueError, match=r"step 2: rank 0 sends piece .* neither owns nor"):
        dataclasses.replace(schedule, piece=piece).validate()


def test_piece_that_misses_ranks():
    schedule = build("ring", 4)
    short = dataclasses.replace(
        schedule, destination=schedule.destination[:2], piece=schedule.piece[:2]
    )
    with pytest.raises(ValueError, match=r"piece 0 visits rank 3 0 times"):
        short.validate()


def test_ownership():
    with pytest.raises(ValueError, match=r"rank 0 owns 0 pieces; every rank must own 1"):
        changed(build("ring", 3), "owner", (0,), 1).validate()


@pytest.mark.parametrize(
    ("field", "index", "value"),
    [("owner", (0,), 3), ("destination", (0, 0, 0), -1), ("piece", (1, 0, 0), 9)],
)
def test_numbers_out_of_range(field: str, index: tuple[int, ...], value: int):
    with pytest.raises(ValueError, match=rf"{field} must be in 0..2; got {value}"):
        changed(build("ring", 3), field, index, value).validate()


def test_shapes_and_types_of_the_arrays():
    schedule = build("ring", 3)
    with pytest.raises(ValueError, match="owner must have one entry for each of 3 x 1 pieces"):
        dataclasses.replace(schedule, owner=np.arange(4))
    with pytest.raises(ValueError, match=r"must both be \[steps, 3, lanes\]"):
        dataclasses.replace(schedule, piece=schedule.piece[:1])
    with pytest.raises(ValueError, match="piece must hold integers; got dtype float64"):
        dataclasses.replace(schedule, piece=schedule.piece * 1.0)
    with pytest.raises(ValueError, match="pieces_per_rank must be at least 1; got 0"):
        dataclasses.replace(schedule, pieces_per_rank=0)


def test_arrays_are_copied_and_read_only():
    owner = np.arange(3)
    schedule = dataclasses.replace(build("ring", 3), owner=owner)
    owner[0] = 2
    assert schedule.owner[0] == 0
    with pytest.raises(ValueError, match="read-only"):
        schedule.owner[0] = 1


@pytest.mark.parametrize("n", [4, 6])
def test_no_decomposition(n: int):
    with pytest.raises(ValueError, match=rf"num_ranks={n} has no decomposition .*'full_link'"):
        build("hamilton", n)


@pytest.mark.parametrize("kind", ["ring", "hamilton", "full_link", "xor", "all_gather"])
@pytest.mark.parametrize("n", [0, -3])
def test_too_few_ranks(kind: str, n: int):
    with pytest.raises(ValueError, match=rf"num_ranks must be at least [12].*; got {n}"):
        build(kind, n)


@pytest.mark.parametrize("kind", ["hamilton", "full_link", "xor"])
def test_one_rank_has_no_links(kind: str):
    with pytest.raises(ValueError, match="num_ranks must be at least 2"):
        build(kind, 1)


@pytest.mark.parametrize("n", [3, 6, 12, 48, 2048])
def test_xor_needs_a_power_of_two(n: int):
    with pytest.raises(ValueError, match=rf"power of two, 2 to 1024, for xor; got {n}"):
        build("xor", n)


@pytest.mark.parametrize("per_node", [3, 5])
def test_nodes_without_paths(per_node: int):
    with pytest.raises(ValueError, match=rf"ranks_per_node={per_node} has no decomposition"):
        build("multinode", 2 * per_node, ranks_per_node=per_node)


@pytest.mark.parametrize("per_node", [3, 8, 16])
def test_nodes_that_do_not_divide(per_node: int):
    with pytest.raises(ValueError, match=rf"into at least two nodes; got {per_node}"):
        build("multinode", 8, ranks_per_node=per_node)


def test_too_few_pieces():
    with pytest.raises(ValueError, match="pieces must be at least 1; got 0"):
        build("all_gather", 4, pieces=0)


@pytest.mark.parametrize(
    ("name", "near"),
    [("hamiltonian", "hamilton"), ("Full-Link", "full_link"), ("allgather", "all_gather")],
)
def test_unknown_name_suggests_the_nearest(name: str, near: str):
    with pytest.raises(ValueError, match=rf"unknown schedule '{name}'; did you mean '{near}'\?"):
        build(name, 8)


def test_unknown_name_without_a_near_one_lists_all():
    with pytest.raises(ValueError, match="unknown schedule 'zzz'; known: ") as caught:
        build("zzz", 8)
    assert all(kind in str(caught.value) for kind in KINDS)


def test_arguments_of_other_kinds_are_refused():
    with pytest.raises(ValueError, match="'ring' does not take ranks_per_node; got 4"):
        build("ring", 8, ranks_per_node=4)
    with pytest.raises(ValueError, match="'multinode' needs ranks_per_node; got None"):
        build("multinode", 16)
    with pytest.raises(ValueError, match="'hamilton' does not take pieces; got 3"):
        build("hamilton", 8, pieces=3)
    with pytest.raises(ValueError, match="'multinode' does not take pieces; got 3"):
        build("multinode", 16, ranks_per_node=8, pieces=3)


@pytest.mark.parametrize("value", [True, 2.0, "8", None])
def test_counts_must_be_integers(value: object):
    with pytest.raises(TypeError, match="num_ranks must be an integer"):
        at_least("num_ranks", value, 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0])
def test_quantities_must_be_finite_and_positive(value: float):
    with pytest.raises(ValueError, match="rate must be a positive, finite number"):
        positive("rate", value)
