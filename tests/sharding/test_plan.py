"""The choice of schedule and transport by modelled time."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.sharding import TOPOLOGIES, Schedule, Topology, Workload, build, plan
from jaxinfer.sharding.sequence_parallel.plan import Transport, predict_transport
from jaxinfer.sharding.sequence_parallel.ring import plan_for
from tests.paths import REPOSITORY

RESULTS = REPOSITORY / "bench" / "results"

WORK = Workload(tokens_per_rank=840, num_heads=8, num_kv_heads=8, head_dim=64)
BARE = Topology(
    name="bare",
    num_ranks=8,
    link_bytes_per_s=1e9,
    port_bytes_per_s=7e9,
    latency_s=1e-3,
    message_s=0.0,
)


def test_permutes_of_a_step_go_one_after_another():
    hamilton = build("hamilton", 8)
    each = 1e-3 + WORK.block_bytes / 7 / 1e9
    one_by_one = predict_transport(hamilton, "ppermute", BARE, WORK)
    assert one_by_one.communication_s == pytest.approx((7 * each,) * 7)
    together = predict_transport(hamilton, "all_to_all", BARE, WORK)
    assert together.communication_s == pytest.approx((each,) * 7)
    assert together == hamilton.predict(BARE, WORK)


def test_idle_links_carry_something_in_a_grouped_exchange():
    ring = build("ring", 8)
    narrow = dataclasses.replace(BARE, port_bytes_per_s=1e9)
    grouped = predict_transport(ring, "all_to_all", narrow, WORK)
    assert grouped.communication_s == pytest.approx((1e-3 + 7 * WORK.block_bytes / 1e9,) * 7)
    assert predict_transport(ring, "ppermute", narrow, WORK) == ring.predict(narrow, WORK)


def test_a_group_sends_its_pieces_only_but_not_beside_attention():
    hamilton, ring = build("hamilton", 8), build("ring", 8)
    group = predict_transport(hamilton, "collective_group", BARE, WORK)
    beside = predict_transport(hamilton, "all_to_all", BARE, WORK)
    assert group.communication_s == beside.communication_s
    assert group.total_s == pytest.approx(sum(group.communication_s) + sum(group.computation_s))
    assert group.total_s > beside.total_s
    alone = predict_transport(ring, "collective_group", BARE, WORK)
    assert alone.communication_s == predict_transport(ring, "ppermute", BARE, WORK).communication_s


def test_all_gather_of_heads_waits_for_the_first_group():
    schedule = build("all_gather", 8, pieces=4)
    got = predict_transport(schedule, "all_gather", BARE, WORK)
    exchange = 1e-3 + WORK.block_bytes / 4 / 1e9
    group = WORK.block_s * 8 / 4 + WORK.step_overhead_s
    assert got.communication_s == pytest.approx((exchange,) * 4)
    assert got.computation_s == pytest.approx((group,) * 4)
    assert got.total_s == pytest.approx(exchange + 3 * max(exchange, group) + group)


def test_pieces_with_masks_of_their_own_have_calls_of_their_own():
    """Striped placement: one call for each lane, and for each block that was gathered."""
    hamilton, heads = build("hamilton", 8), build("all_gather", 8, pieces=4)
    call = WORK.step_overhead_s
    pairs: list[tuple[Schedule, Transport, int]]
    pairs = [(hamilton, "all_to_all", 6), (heads, "all_gather", 7)]
    for schedule, transport, more in pairs:
        one = predict_transport(schedule, transport, BARE, WORK)
        every = predict_transport(schedule, transport, BARE, WORK, masks_differ=True)
        assert every.communication_s == one.communication_s
        first = transport != "all_gather"  # the own block has one mask
        assert every.computation_s[:first] == one.computation_s[:first]
        assert every.computation_s[first:] == pytest.approx(
            [seconds + more * call for seconds in one.computation_s[first:]]
        )
    ring = build("ring", 8)
    assert predict_transport(ring, "ppermute", BARE, WORK, masks_differ=True) == (
        predict_transport(ring, "ppermute", BARE, WORK)
    )


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([name for name in TOPOLOGIES if name != "h100-nodes"]),
    st.sampled_from([2, 3, 4, 6, 8]),
    st.sampled_from([1, 7, 64, 1680, 20000]),
    st.sampled_from([1, 3, 8]),
    st.booleans(),
    st.booleans(),
)
def test_never_slower_than_the_ring_it_replaces(name, n, tokens, kv_heads, causal, striped):
    work = Workload(tokens_per_rank=tokens, num_heads=24, num_kv_heads=kv_heads, head_dim=128,
                    causal=causal)  # fmt: skip
    chosen = plan(
        TOPOLOGIES[name](n), work, chunks=2 if causal and not striped else 1, masks_differ=striped
    )
    taken = chosen.predictions[chosen.schedule.name, chosen.transport]
    assert taken.total_s <= chosen.predictions["ring", "ppermute"].total_s
    if chosen.transport != "all_gather":
        assert tokens % chosen.schedule.pieces_per_rank == 0 or chosen.schedule.name == "ring"


def test_stripes_are_not_cut():
    """A piece of a stripe needs an offset, and then the slowest implementation."""
    for n in (3, 4, 8):
        for tokens in (256, 1680, 2624):
            work = dataclasses.replace(WORK, tokens_per_rank=tokens, causal=True)
            chosen = plan(TOPOLOGIES["mi300x-mesh"](n), work, masks_differ=True)
            assert chosen.transport == "all_gather" or chosen.schedule.pieces_per_rank == 1
    named = plan(TOPOLOGIES["mi300x-mesh"](8), WORK, schedule="xor", masks_differ=True)
    assert named.schedule.name == "xor"


def test_the_choice_is_what_was_faster_on_two_gpus():
    """The ring or one gather: the figures of `h200_nvswitch` and its rows must not drift apart."""
    rows = json.loads((RESULTS / "nvidia_h200" / "ring_attention.json").read_text())
    times = {(row["case"], row["implementation"]): row["median_us"] for row in rows}
    cases = sorted({row["case"] for row in rows if " n2 " in row["case"]})
    assert len(cases) >= 5
    for case in cases:
        _, _, tokens, mask = case.split()
        chosen = plan_for(
            2, (1, int(tokens[1:]), 32, 128), 8, 2, schedule=None, transport=None, topology=None,
            placement="zigzag" if mask == "causal" else "contiguous", is_causal=mask == "causal",
        )  # fmt: skip
        faster = min(("ring", "xla-all_gather"), key=lambda name: times[case, name])
        assert chosen.transport == ("ppermute" if faster == "ring" else "all_gather"), case


def test_one_rank():
    chosen = plan(TOPOLOGIES["pcie5"](1), WORK)
    assert (chosen.schedule.name, chosen.transport) == ("ring", "ppermute")
    assert plan(TOPOLOGIES["pcie5"](1), WORK, transport="all_gather").transport == "all_gather"


def test_what_is_given_is_taken():
    topology = TOPOLOGIES["h100-nvswitch"](8)
    for kind in ("xor", "hamilton"):
        chosen = plan(topology, WORK, schedule=kind)
        assert chosen.schedule.name == kind
        assert chosen.transport == "all_to_all"
    ring = build("ring", 8)
    assert plan(topology, WORK, schedule=ring).schedule is ring
    assert plan(topology, WORK, schedule=ring).transport == "ppermute"
    for transport in ("ppermute", "all_to_all", "all_gather", "collective_group"):
        assert plan(topology, WORK, transport=transport).transport == transport
    chosen = plan(topology, WORK, transport="collective_group")
    assert {transport for _, transport in chosen.predictions} == {"collective_group"}
    assert ("ring", "collective_group") not in plan(topology, WORK).predictions
    short, long = (
        plan(
            topology, dataclasses.replace(WORK, tokens_per_rank=tokens),
            schedule="all_gather", transport="all_gather",
        ).schedule.pieces_per_rank
        for tokens in (840, 84_000)
    )  # fmt: skip
    # Groups of 8 KV heads, at most 7: a call each, and only the first is waited for.
    assert (short, long) == (1, 4)


def test_a_schedule_that_is_not_exact_is_refused():
    ring = build("ring", 8)
    twice = dataclasses.replace(ring, piece=np.broadcast_to(ring.piece[:1], ring.piece.shape))
    with pytest.raises(ValueError, match="piece 0 visits rank 1 7 times"):
        plan(TOPOLOGIES["h100-nvswitch"](8), WORK, schedule=twice)


def test_several_nodes_have_a_schedule_of_their_own():
    nodes = TOPOLOGIES["h100-nodes"](16)
    assert plan(nodes, WORK, schedule="multinode").schedule.name == "multinode"
    chosen = plan(TOPOLOGIES["h100-nodes"](16), dataclasses.replace(WORK, tokens_per_rank=256))
    assert ("multinode", "ppermute") in chosen.predictions
    assert chosen.schedule.num_ranks == 16


@pytest.mark.parametrize(("options", "message"), [
    ({"transport": "nccl"}, "unknown transport 'nccl'; known: ppermute, all_to_all, all_gather, "
     "collective_group"),
    ({"schedule": "hamiltonian"}, "did you mean 'hamilton'"),
    ({"schedule": build("ring", 4)}, "has 4 ranks; got 8"),
    ({"schedule": "xor", "transport": "all_gather"}, "carries schedule 'all_gather' only"),
    ({"schedule": build("all_gather", 8, pieces=3), "transport": "all_gather"}, "divide 8; got 3"),
])  # fmt: skip
def test_what_cannot_be_is_refused(unchecked, options, message):
    with pytest.raises(ValueError, match=message):
        plan(TOPOLOGIES["pcie5"](8), WORK, **options)
