"""All transports bring every rank the pieces that the schedule promises, at every step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxinfer.sharding.sequence_parallel.exchange import EXCHANGES, origins, sources
from tests.ops.cases import quick_compilation
from tests.sharding import stand_in
from tests.sharding.eight_devices.runs import mesh_of, schedules


def follow(schedule, transport, own):
    """Every step's arrivals: `[steps, 1, lanes]` piece numbers on each rank."""
    exchange = functools.partial(EXCHANGES[transport], schedule)
    current, seen = None, []
    for step in range(schedule.num_steps):
        current = exchange(step, own[0], current, "seq")
        seen.append(current[None])
    return jnp.stack(seen)


@pytest.mark.parametrize("transport", EXCHANGES)
@pytest.mark.parametrize("n", range(2, 9))
def test_every_schedule_arrives(monkeypatch, n: int, transport: str):
    if transport == "collective_group":
        stand_in.install(monkeypatch)
    todo = schedules(n)
    own = [jnp.asarray(schedule.own_pieces()) for schedule in todo.values()]

    def local(*own):
        return [follow(s, transport, x) for s, x in zip(todo.values(), own, strict=True)]

    call = jax.shard_map(
        local, mesh=mesh_of(n), in_specs=P("seq"), out_specs=P(None, "seq"), check_vma=False
    )
    with quick_compilation():
        got = jax.jit(call)(*own)
    for (kind, schedule), arrived in zip(todo.items(), got, strict=True):
        np.testing.assert_array_equal(arrived, schedule.arrivals(), err_msg=kind)


@pytest.mark.parametrize("n", range(2, 9))
def test_tables_name_what_is_sent(n: int):
    for kind, schedule in schedules(n).items():
        m, own, arrived = schedule.pieces_per_rank, schedule.own_pieces(), schedule.arrivals()
        slot = sources(schedule)
        for step, rank, lane in np.ndindex(slot.shape):
            held = [*own[rank], *(arrived[step - 1, rank] if step else ())]
            assert held[slot[step, rank, lane]] == schedule.piece[step, rank, lane], kind
        owner, number = origins(schedule)
        np.testing.assert_array_equal(own[owner, number], arrived, err_msg=kind)
        assert number.max() < m


def test_a_piece_of_any_shape_and_dtype():
    schedule = schedules(4)["full_link"]
    own = jnp.asarray(schedule.own_pieces()).astype(jnp.bfloat16)[..., None, None]
    own = jnp.broadcast_to(own, (4, 3, 2, 5))

    def local(own):
        return follow(schedule, "all_to_all", own)

    call = jax.shard_map(local, mesh=mesh_of(4), in_specs=P("seq"), out_specs=P(None, "seq"))
    got = jax.jit(call)(own)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got[..., 1, 4].astype(jnp.int32), schedule.arrivals())
