"""The cost model, its topologies, and the choice that follows from them."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.sharding import TOPOLOGIES, Schedule, Topology, Workload, build, choose
from jaxinfer.sharding.choose import candidates
from jaxinfer.sharding.published import PUBLISHED, grid
from jaxinfer.sharding.topology import (
    h100_nodes,
    h100_nvswitch,
    mi300x_mesh,
    pcie5,
)

WORK = Workload(tokens_per_rank=1000, num_heads=8, num_kv_heads=2, head_dim=64)
BARE = Topology(
    name="bare",
    num_ranks=8,
    link_bytes_per_s=1e9,
    port_bytes_per_s=7e9,
    latency_s=0.0,
    message_s=0.0,
)


def test_workload_counts_bytes_and_operations():
    assert WORK.block_bytes == 2 * 1000 * 2 * 64 * 2
    assert WORK.block_s == pytest.approx(4 * 1000**2 * 8 * 64 / 600e12)
    assert dataclasses.replace(WORK, causal=True).block_s == pytest.approx(WORK.block_s / 2)
    assert dataclasses.replace(WORK, batch=3).block_bytes == 3 * WORK.block_bytes


def test_ring_step_is_one_block_over_one_link():
    prediction = build("ring", 8).predict(BARE, WORK)
    assert prediction.communication_s == pytest.approx((WORK.block_bytes / 1e9,) * 7)
    assert prediction.computation_s == pytest.approx((WORK.block_s + 10e-6,) * 8)
    step = max(WORK.block_bytes / 1e9, WORK.block_s + 10e-6)
    assert prediction.total_s == pytest.approx(7 * step + WORK.block_s + 10e-6)
    assert prediction.exposed_s == pytest.approx(7 * (WORK.block_bytes / 1e9 - WORK.block_s - 1e-5))


@pytest.mark.parametrize("kind", ["hamilton", "full_link", "xor", "all_gather"])
def test_full_link_steps_divide_the_block_by_all_links(kind: str):
    prediction = build(kind, 8).predict(BARE, WORK)
    assert prediction.communication_s == pytest.approx((WORK.block_bytes / 7e9,) * 7)


def test_port_limits_what_links_add_up_to():
    narrow = dataclasses.replace(BARE, port_bytes_per_s=2e9)
    prediction = build("hamilton", 8).predict(narrow, WORK)
    assert prediction.communication_s == pytest.approx((WORK.block_bytes / 2e9,) * 7)


def test_latency_and_messages_add_up():
    slow = dataclasses.replace(BARE, latency_s=1.0, message_s=0.1)
    ring = build("ring", 8).predict(slow, WORK).communication_s[0]
    full = build("hamilton", 8).predict(slow, WORK).communication_s[0]
    assert ring == pytest.approx(1.1 + WORK.block_bytes / 1e9)
    assert full == pytest.approx(1.7 + WORK.block_bytes / 7e9)


def test_network_card_carries_what_leaves_the_node():
    nodes = dataclasses.replace(
        BARE, num_ranks=16, ranks_per_node=8, nic_bytes_per_s=0.5e9, nic_latency_s=2.0
    )
    block = WORK.block_bytes
    ring = build("ring", 16).predict(nodes, WORK).communication_s
    assert ring == pytest.approx((2 + block / 0.5e9,) * 15)
    multi = build("multinode", 16, ranks_per_node=8).predict(nodes, WORK).communication_s
    assert multi == pytest.approx((2 + block / 8 / 0.5e9,) * 15)
    flat = build("hamilton", 16).predict(nodes, WORK).communication_s
    assert flat == pytest.approx((2 + 8 * block / 15 / 0.5e9,) * 15)


def test_ratio_tends_to_the_published_formula():
    # (S/n)·(N/K)·bandwidth/rate of a ring, with overheads taken away.
    work = dataclasses.replace(WORK, step_overhead_s=0.0)
    prediction = build("ring", 8).predict(BARE, work)
    ratio = prediction.computation_s[1] / prediction.communication_s[1]
    assert ratio == pytest.approx(1000 * 4 * 1e9 / 600e12)
    assert prediction.compute_to_communication == pytest.approx(ratio * 8 / 7)


def test_one_rank_communicates_nothing():
    alone = dataclasses.replace(BARE, num_ranks=1)
    prediction = build("ring", 1).predict(alone, WORK)
    assert prediction.communication_s == ()
    assert prediction.exposed_s == 0
    assert prediction.compute_to_communication == math.inf
    assert choose(alone, WORK).schedule.name == "ring"


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(TOPOLOGIES)),
    ranks=st.sampled_from([2, 3, 4, 6, 7, 8, 10, 16]),
    tokens=st.integers(1, 10**6),
    group=st.sampled_from([1, 4, 8]),
    causal=st.booleans(),
)
def test_choice_is_never_predicted_slower_than_the_ring(
    name: str, ranks: int, tokens: int, group: int, causal: bool
):
    several = name == "h100-nodes"
    topology = h100_nodes(2 * ranks, ranks) if several else TOPOLOGIES[name](ranks)
    work = Workload(
        tokens_per_rank=tokens, num_heads=8 * group, num_kv_heads=8, head_dim=128, causal=causal
    )
    choice = choose(topology, work)
    choice.schedule.validate()
    assert choice.speedup >= 1
    least = min(p.total_s for p in choice.predictions.values())
    assert choice.predictions[choice.schedule.name].total_s <= least * 1.001


def test_choices_where_they_are_plain():
    short = dataclasses.replace(WORK, tokens_per_rank=1024, num_heads=32, num_kv_heads=32)
    long = dataclasses.replace(short, tokens_per_rank=65536)
    assert choose(pcie5(8), short).schedule.name == "ring"
    assert choose(mi300x_mesh(8), short).schedule.name == "all_gather"
    assert choose(mi300x_mesh(8), long).schedule.name == "ring"
    assert choose(h100_nodes(16, 8), short).schedule.name == "multinode"


def test_candidates_are_all_kinds_that_exist():
    assert list(candidates(h100_nvswitch(8))) == ["ring", "all_gather", "xor", "full_link"]
    assert list(candidates(h100_nvswitch(6))) == ["ring", "all_gather", "full_link"]
    assert "multinode" in candidates(h100_nodes(16, 8))
    assert "multinode" not in candidates(h100_nodes(6, 3))


def test_order_of_the_published_gains():
    """Little behind a switch, much in a mesh, more with a causal mask, most at best."""
    found = {(p.topology(8).name, p.causal): (p, p.modelled()) for p in PUBLISHED}
    rows = [
        found[name, causal] for name in ("h100-nvswitch", "mi300x-tasp") for causal in (False, True)
    ]
    published = [p.mean for p, _ in rows] + [max(p.most for p, _ in rows)]
    modelled = [mean for _, (mean, _) in rows] + [max(most for _, (_, most) in rows)]
    assert published == sorted(published) == [1.05, 1.08, 1.57, 1.68, 3.58]
    assert modelled == sorted(modelled)
    assert len(set(modelled)) == len(modelled)
    for p, (mean, most) in rows:
        assert mean == pytest.approx(p.mean, abs=0.1 if p.system == "H100" else 0.2)
        assert 1 < mean < most
    for causal in (False, True):
        switch, mesh, sheet = (
            found[name, causal] for name in ("h100-nvswitch", "mi300x-tasp", "mi300x-mesh")
        )
        assert switch[0].most < mesh[0].most
        assert switch[1][1] < mesh[1][1] < sheet[1][1]
        assert mesh[1][1] < mesh[0].most < sheet[1][1], "the best published one lies between"


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda p: f"{p.topology(8).name}-{p.causal}")
def test_choices_on_the_published_grid_are_never_predicted_slower_than_the_ring(row):
    links = row.topology(8)
    for work in grid(causal=row.causal, flops_per_s=row.flops_per_s):
        choice = choose(links, work)
        rings = build("hamilton", 8).predict(links, work).total_s
        assert choice.speedup >= 1
        assert choice.predictions[choice.schedule.name].total_s <= rings * 1.001


def test_the_published_grid():
    work = grid(causal=True, flops_per_s=1e12)
    # i and j from 0 to 7, and i + j at most 11: 6 of 64 pairs are too long.
    assert len(work) == 3 * (64 - 6)
    assert max(w.tokens_per_rank * 8 * w.batch for w in work) == 3360 * 2**11 <= 10e6


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, 0.0])
@pytest.mark.parametrize("field", ["link_bytes_per_s", "port_bytes_per_s", "nic_bytes_per_s"])
def test_link_figures_must_be_finite(field: str, bad: float):
    with pytest.raises(ValueError, match=rf"{field} must be a positive, finite number; got"):
        dataclasses.replace(BARE, **{field: bad})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e-9])
@pytest.mark.parametrize("field", ["latency_s", "message_s", "nic_latency_s"])
def test_latencies_must_be_finite(field: str, bad: float):
    with pytest.raises(ValueError, match=rf"{field} must be zero or a positive, finite number"):
        dataclasses.replace(BARE, **{field: bad})


def test_nodes_must_fit():
    with pytest.raises(ValueError, match="ranks_per_node must divide num_ranks=8; got 3"):
        dataclasses.replace(BARE, ranks_per_node=3)
    with pytest.raises(ValueError, match="2 nodes need nic_bytes_per_s; got None"):
        dataclasses.replace(BARE, ranks_per_node=4)
    with pytest.raises(ValueError, match="num_ranks must be at least 1; got 0"):
        dataclasses.replace(BARE, num_ranks=0)


def test_topology_of_another_size():
    with pytest.raises(ValueError, match="the schedule has 4 ranks; topology 'bare' has 8"):
        build("ring", 4).predict(BARE, WORK)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_rates_must_be_finite(bad: float):
    with pytest.raises(ValueError, match="flops_per_s must be a positive, finite number"):
        dataclasses.replace(WORK, flops_per_s=bad)


def test_heads_must_divide():
    with pytest.raises(ValueError, match="num_heads must be a multiple of num_kv_heads; got 8 and"):
        dataclasses.replace(WORK, num_kv_heads=3)
    with pytest.raises(ValueError, match="tokens_per_rank must be at least 1; got 0"):
        dataclasses.replace(WORK, tokens_per_rank=0)


def test_prediction_sums_its_steps():
    schedule: Schedule = build("full_link", 6)
    prediction = schedule.predict(h100_nvswitch(6), WORK)
    assert len(prediction.communication_s) == 5
    assert len(prediction.computation_s) == 6
    assert prediction.total_s >= max(
        sum(prediction.communication_s), sum(prediction.computation_s[:-1])
    )
