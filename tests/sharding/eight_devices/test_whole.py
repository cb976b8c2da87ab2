"""`sequence_parallel_attention`: any length, any mesh, any number of heads."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfer.sharding import build, sequence_parallel_attention
from tests.ops.cases import quick_compilation
from tests.sharding.eight_devices.runs import check, mesh_of, qkv

LENGTHS = [5, 29]


def run(mesh, S, heads, *, axis="seq", lengths=None, is_causal=True, **options):
    arrays = qkv(S, *heads)
    given = None if lengths is None else jnp.asarray(lengths, jnp.int32)
    with quick_compilation():
        result = sequence_parallel_attention(
            mesh, axis, *arrays, lengths=given, is_causal=is_causal, return_residual=True, **options
        )
    check(result, arrays, given, is_causal=is_causal)


@pytest.mark.parametrize(("n", "S"), [(3, 1), (5, 40), (5, 41), (8, 63)])
def test_lengths_that_no_schedule_divides(n, S):
    run(mesh_of(n), S, (9, 3), schedule="hamilton", transport="all_to_all")


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("placement", ["contiguous", "striped", None])
def test_padding_is_seen_by_no_query(placement, lengths):
    """Without a causal mask the padding would be seen, were it not for its length."""
    run(mesh_of(3), 29, (2, 1), is_causal=False, lengths=lengths, placement=placement,
        schedule="full_link")  # fmt: skip


@pytest.mark.parametrize(("n", "share", "N", "K"), [
    (2, 4, 9, 3), (4, 2, 9, 3), (2, 3, 8, 1), (1, 8, 9, 3), (3, 1, 8, 1),
])  # fmt: skip
def test_heads_and_tokens_over_two_axes(n, share, N, K):
    """SmolLM2's 9 and 3 heads, which no axis divides; one KV head for all."""
    run(mesh_of(n, share), 29, (N, K), ulysses_axis="other", lengths=LENGTHS)


def test_hybrid_takes_the_options_of_the_ring():
    run(mesh_of(3, 2), 50, (4, 2), ulysses_axis="other", schedule="full_link",
        transport="all_to_all", placement="striped")  # fmt: skip
    run(mesh_of(3, 2), 50, (8, 4), ulysses_axis="other", transport="all_gather")


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("in_context", [False, True])
def test_meshes_of_both_types(kind, in_context):
    mesh = jax.make_mesh((2, 4), ("seq", "other"), axis_types=(kind,) * 2)
    arrays = qkv(16, 2, 2)
    for spec in (None, P(None, "seq")):
        given = arrays
        if spec is not None:
            given = [jax.device_put(x, NamedSharding(mesh, spec)) for x in arrays]
        call = lambda *x: sequence_parallel_attention(mesh, "seq", *x, return_residual=True)
        with quick_compilation():
            if in_context:
                with jax.set_mesh(mesh):
                    result = jax.jit(call)(*given)
            else:
                result = call(*given)
        check(result, arrays, is_causal=True)


def test_output_alone_and_one_device():
    arrays = qkv(9, 2, 2)
    out = sequence_parallel_attention(mesh_of(1), "seq", *arrays, implementation=["xla"])
    assert isinstance(out, jax.Array)
    assert out.shape == (2, 9, 2, 8)


@pytest.mark.parametrize(("options", "message"), [
    ({"axis": "sequence"}, "mesh has axes seq, other; got 'sequence'"),
    ({"ulysses_axis": "heads"}, "mesh has axes seq, other; got 'heads'"),
    ({"ulysses_axis": "seq"}, "axis and ulysses_axis must differ"),
    ({"schedule": "hamilton"}, "4"),
    ({"schedule": build("ring", 3)}, "has 3 ranks; got 4"),
    ({"placement": "stripes"}, "did you mean 'striped'"),
])  # fmt: skip
def test_what_cannot_be_is_refused(unchecked, options, message):
    call = {"axis": "seq", **options}
    with pytest.raises(ValueError, match=message):
        sequence_parallel_attention(mesh_of(4, 2), call.pop("axis"), *qkv(8, 2, 2), **call)
