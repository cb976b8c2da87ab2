"""`ring_attention` equals attention on one device: schedules, placements, masks, transports."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxinfer.pallas_kernels import NotSupported, attention
from jaxinfer.sharding import build, place, ring_attention, unplace
from jaxinfer.sharding.sequence_parallel import step
from jaxinfer.sharding.topology import mi300x_mesh
from tests.metrics import assert_dtype_close
from tests.ops import oracle
from tests.sharding.eight_devices.runs import check, mesh_of, qkv, run_ring, schedules

PLACEMENTS = ("contiguous", "zigzag", "striped")
MASKS = ((True, False), (True, True), (False, False), (False, True))
# With every number of ranks each kind meets another placement, mask and transport.
TURN = itertools.cycle(itertools.product(PLACEMENTS, MASKS, ("all_to_all", "ppermute")))
EVERY_KIND = [
    pytest.param(n, kind, *next(TURN), id=f"{kind}-{n}")
    for kind in ("ring", "hamilton", "full_link", "xor", "all_gather", "multinode")
    for n in range(2, 9)
    if kind in schedules(n)
    # Elsewhere full_link is hamilton.
    and not (kind == "full_link" and n not in (4, 6))
]


def ragged(n: int, tokens: int) -> list[int]:
    """One row that ends within the last rank's tokens, one within an early rank's."""
    return [n * tokens - 1, max(tokens // 2, 1)]


@pytest.mark.parametrize(("n", "kind", "placement", "mask", "transport"), EVERY_KIND)
def test_every_kind_for_every_number_of_ranks(n, kind, placement, mask, transport):
    schedule = schedules(n)[kind]
    is_causal, padded = mask
    tokens = 2 * schedule.pieces_per_rank
    run_ring(
        n, schedule, placement=placement, is_causal=is_causal, transport=transport, tokens=tokens,
        lengths=ragged(n, tokens) if padded else None,
    )  # fmt: skip


@pytest.mark.parametrize("mask", MASKS, ids=("causal", "causal-ragged", "full", "full-ragged"))
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("kind", "transport"), [
    ("ring", "ppermute"), ("full_link", "all_to_all"), ("heads", "all_gather"),
])  # fmt: skip
def test_every_placement_and_mask(kind, transport, placement, mask):
    """Heads in groups of three, as in SmolLM2."""
    n, tokens = 3, 8
    schedule = build("all_gather", n, pieces=3) if kind == "heads" else build(kind, n)
    is_causal, padded = mask
    run_ring(
        n, schedule, placement=placement, is_causal=is_causal, transport=transport, tokens=tokens,
        lengths=ragged(n, tokens) if padded else None, heads=(9, 3),
    )  # fmt: skip


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", ["ring", "full_link"])
def test_lengths_that_end_anywhere(kind, placement):
    """Every length of a sequence, as rows of one batch; the first row is empty."""
    n, tokens = 3, 4
    run_ring(n, schedules(n)[kind], placement=placement, tokens=tokens, heads=(1, 1),
             lengths=list(range(n * tokens + 1)), B=n * tokens + 1)  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_types_are_merged_in_float32(dtype):
    run_ring(8, "ring", placement="zigzag", dtype=dtype, tokens=4)


def test_scale_is_used():
    run_ring(2, "ring", placement="contiguous", scale=0.7, tokens=5)


@pytest.mark.parametrize(("kind", "transport", "window"), [
    ("ring", "ppermute", 0), ("ring", "ppermute", 2), ("ring", "ppermute", 7),
    ("ring", "ppermute", (9, 4)), ("full_link", "all_to_all", 2), ("full_link", "all_to_all", 6),
    ("heads", "all_gather", 3), ("heads", "all_gather", 5),
])  # fmt: skip
def test_windows_fall_on_all_stripes(kind, transport, window):
    n, tokens = 4, 6
    schedule = build("all_gather", n, pieces=3) if kind == "heads" else build(kind, n)
    run_ring(
        n, schedule, placement="striped", transport=transport, tokens=tokens, heads=(6, 3),
        lengths=ragged(n, tokens), local_window_size=window, logits_softcap=1.5,
    )  # fmt: skip


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_soft_caps(placement):
    run_ring(2, "ring", placement=placement, tokens=4, logits_softcap=0.8)


def test_one_rank_has_the_whole_window():
    run_ring(1, None, placement="striped", tokens=9, local_window_size=3)


def test_one_rank_is_plain_attention():
    run_ring(1, None, placement="zigzag", tokens=6)


def test_the_choice_fits_the_tokens():
    """Seven pieces would be faster, but five tokens cannot be cut into them."""
    run_ring(8, None, placement="contiguous", tokens=5, topology=mi300x_mesh(8), B=1)


@pytest.mark.parametrize(("n", "placement", "transport", "is_causal", "needed"), [
    (1, "contiguous", None, True, False), (2, "zigzag", "ppermute", True, True),
    (2, "zigzag", "all_gather", True, True), (2, "zigzag", "all_gather", False, False),
    (2, "striped", "all_gather", True, True), (2, "contiguous", "all_gather", True, True),
    (1, "contiguous", "all_gather", True, True),
])  # fmt: skip
def test_log_sum_exps_are_asked_for_only_where_parts_are_merged(
    monkeypatch, n, placement, transport, is_causal, needed
):
    """More implementations can serve a call without, and without an offset."""
    asked, offsets = set(), []

    def attention_seen(*arrays, **options: Any):
        asked.add(options.get("return_residual", False))
        offsets.append(options.get("q_offset"))
        return attention(*arrays, **options)

    monkeypatch.setattr(step, "attention", attention_seen)
    arrays = qkv(4 * n, 2, 2)

    def local(*arrays):
        return ring_attention(
            *arrays, axis_name="seq", placement=placement, transport=transport, is_causal=is_causal
        )

    call = jax.shard_map(local, mesh=mesh_of(n), in_specs=P(None, "seq"),
                         out_specs=P(None, "seq"), check_vma=False)  # fmt: skip
    out = jax.jit(call)(*(place(x, placement, n) for x in arrays))
    assert asked == {needed}
    assert not any(offset is not None for offset in offsets)
    want, _ = oracle.attention(*arrays, is_causal=is_causal)
    assert_dtype_close(unplace(out, placement, n), want, "float32")


@pytest.mark.parametrize("transport", ["ppermute", "all_gather"])
def test_whole_stripes_need_no_offset(monkeypatch, transport):
    """Which would leave few implementations, and fast ones not among them."""
    asked: list[dict] = []

    def attention_seen(*arrays, **options: Any):
        asked.append(options)
        return attention(*arrays, **options)

    monkeypatch.setattr(step, "attention", attention_seen)
    run_ring(2, None, placement="striped", transport=transport, tokens=4)
    assert asked
    for options in asked:
        assert options["is_causal"]
        assert options.get("q_offset") is None
        assert options["key_value_seq_lengths"] is None


def test_a_length_for_all_rows():
    arrays = qkv(8, 2, 2)

    def local(*arrays):
        return ring_attention(*arrays, axis_name="seq", lengths=5, return_residual=True)

    call = jax.shard_map(local, mesh=mesh_of(2), in_specs=P(None, "seq"),
                         out_specs=P(None, "seq"), check_vma=False)  # fmt: skip
    check(jax.jit(call)(*arrays), arrays, np.array([5, 5]), is_causal=True)


def test_beside_other_axes_and_over_two_at_once():
    """Heads sharded over another axis; the sequence over two axes as one."""
    arrays = qkv(24, 4, 2)

    def call(mesh, axis, spec):
        def local(*arrays):
            return ring_attention(*arrays, axis_name=axis, return_residual=True)

        return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec,
                                     check_vma=False))(*arrays)  # fmt: skip

    mesh = mesh_of(4, 2, names=("seq", "tensor"))
    check(call(mesh, "seq", P(None, "seq", "tensor")), arrays, is_causal=True)
    check(call(mesh, ("seq", "tensor"), P(None, ("seq", "tensor"))), arrays, is_causal=True)


def test_exchanges_do_not_wait_for_attention():
    """In the program each exchange stands before the attention that it runs beside."""

    def local(x):
        return ring_attention(x, x, x, axis_name="seq", schedule="ring", is_causal=False)

    call = jax.shard_map(local, mesh=mesh_of(4), in_specs=P(None, "seq"),
                         out_specs=P(None, "seq"), check_vma=False)  # fmt: skip
    program = jax.make_jaxpr(call)(jnp.ones((1, 8, 1, 4)))
    (body,) = [e.params["jaxpr"] for e in program.eqns if e.primitive.name == "shard_map"]
    order: list[str] = []
    waits: dict = {}  # whether a value comes from an attention
    for equation in body.eqns:
        after = any(waits.get(v, False) for v in equation.invars if not hasattr(v, "val"))
        if equation.primitive.name == "ppermute":
            assert not after
            order.append("exchange")
        elif "dot_general" in str(equation):
            after = True
            if order[-1] != "attention":
                order.append("attention")
        waits |= dict.fromkeys(equation.outvars, after)
    # The last attention follows the one before: nothing is left to be sent.
    assert order == ["exchange", "attention"] * 3


ERRORS = [
    ({"schedule": build("ring", 4)}, ValueError, "schedule 'ring' has 4 ranks; got 2"),
    ({"schedule": "rings"}, ValueError, "did you mean 'ring'"),
    ({"schedule": "multinode"}, ValueError, "needs ranks_per_node"),
    ({"placement": "zig-zag"}, ValueError, "did you mean 'zigzag'"),
    ({"placement": "zigzag"}, ValueError, "pad the sequence to 8 tokens"),
    ({"placement": "zigzag", "transport": "all_to_all"}, ValueError, "pad the sequence to 8"),
    ({"transport": "permute"}, ValueError, "did you mean 'ppermute'"),
    ({"transport": "all_gather", "schedule": "ring"}, ValueError, "carries schedule 'all_gather'"),
    ({"transport": "all_gather", "schedule": build("all_gather", 2, pieces=3)}, ValueError,
     "pieces must divide 2; got 3"),
    ({"lengths": jnp.ones(3, jnp.int32)}, ValueError, r"scalar or \[B\] with B=1; got \(3,\)"),
    ({"lengths": jnp.float32(3)}, TypeError, "lengths must be integers; got float32"),
    ({"scale": float("nan")}, ValueError, "scale must be finite"),
    ({"local_window_size": 3}, ValueError, "needs striped placement .*got placement='contiguous'"),
    ({"local_window_size": 3, "placement": "striped", "is_causal": False}, ValueError,
     "a causal mask"),
    ({"local_window_size": -1, "placement": "striped"}, ValueError, "must not be negative; got -1"),
    ({"implementation": "cudnn"}, NotSupported, "cudnn"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "message"), ERRORS)
def test_what_cannot_be_is_refused(unchecked, options, error, message):
    def local(*arrays):
        return ring_attention(*arrays, **{"axis_name": "seq", **options})

    call = jax.shard_map(local, mesh=mesh_of(2), in_specs=P(None, "seq"),
                         out_specs=P(None, "seq"), check_vma=False)  # fmt: skip
    with pytest.raises(error, match=message):
        jax.eval_shape(call, *qkv(6, 4, 2, B=1))


BAD_ARRAYS = [
    ((1, 4, 4), (1, 4, 2, 8), "query must have 4 dimensions"),
    ((1, 4, 4, 8), (1, 6, 2, 8), "same batch size and tokens"),
    ((1, 4, 4, 8), (1, 4, 3, 8), "N=4 and K=3"),
    ((1, 4, 4, 8), (1, 4, 2, 4), "got 8 and 4"),
    ((1, 4, 4, 0), (1, 4, 2, 0), "must not be empty"),
]


@pytest.mark.parametrize(("query", "key", "message"), BAD_ARRAYS)
def test_arrays_that_do_not_go_together(unchecked, query, key, message):
    call = jax.shard_map(
        lambda *arrays: ring_attention(*arrays, axis_name="seq"), mesh=mesh_of(2),
        in_specs=P(None, "seq"), out_specs=P(None, "seq"), check_vma=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call, jnp.zeros(query), jnp.zeros(key), jnp.zeros(key))


def test_one_dtype(unchecked):
    query, key, value = qkv(4, 2, 2)
    call = jax.shard_map(
        lambda *arrays: ring_attention(*arrays, axis_name="seq"), mesh=mesh_of(2),
        in_specs=P(None, "seq"), out_specs=P(None, "seq"), check_vma=False,
    )  # fmt: skip
    with pytest.raises(TypeError, match="must have one dtype"):
        jax.eval_shape(call, query, key.astype(jnp.bfloat16), value)
