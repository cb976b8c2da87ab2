"""Decode against a cache that ranks share equals decode against the whole cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxinfer.pallas_kernels import attention, merge_attention
from jaxinfer.sharding import merge_over_axis, place, sharded_decode_attention
from tests.metrics import assert_dtype_close
from tests.ops import oracle
from tests.ops.cases import quick_compilation, same_bits
from tests.sharding.eight_devices.runs import mesh_of, numbers

SPECS = (P(), P(None, "seq"), P(None, "seq"), P())


def decode(n, query, key, value, lengths, placement):
    def local(query, key, value, lengths):
        return sharded_decode_attention(
            query, key, value, lengths, axis_name="seq", placement=placement, return_residual=True
        )

    call = jax.shard_map(local, mesh=mesh_of(n), in_specs=SPECS, out_specs=P(), check_vma=False)
    with quick_compilation():
        return jax.jit(call)(query, place(key, placement, n), place(value, placement, n), lengths)


@pytest.mark.parametrize("placement", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize(("n", "T"), [(8, 1), (3, 2)])
def test_equals_the_whole_cache(n, T, placement):
    """Empty rows, rows shorter than T, slots past the lengths that hold NaN, and a full cache."""
    S = n * 4
    lengths = np.array([S, 0, 1, S // 2 + 1])
    query, key, value = (numbers(s, i) for i, s in enumerate([(4, T, 9, 8)] + 2 * [(4, S, 3, 8)]))
    held = (np.arange(S) < lengths[:, None])[:, :, None, None]
    out, lse = decode(n, query, jnp.where(held, key, jnp.nan), jnp.where(held, value, jnp.nan),
                      jnp.asarray(lengths), placement)  # fmt: skip
    want = oracle.attention(
        query, key, value, is_causal=True, q_offset=lengths - T, key_value_seq_lengths=lengths
    )
    assert_dtype_close(out, want[0], "float32", "output")
    assert_dtype_close(lse, want[1], "float32", "log-sum-exp")


def test_merge_over_axis_is_merge_attention():
    """Also where one rank, or all of them, saw nothing."""
    out = numbers((4, 3, 5, 8), 0, "bfloat16")
    lse = numbers((4, 3, 5), 1).at[1].set(-jnp.inf).at[:, 0].set(-jnp.inf) * 30
    call = jax.shard_map(
        lambda out, lse: merge_over_axis(out[0], lse[0], "seq"), mesh=mesh_of(4),
        in_specs=P("seq"), out_specs=P(),
    )  # fmt: skip
    got = jax.jit(call)(out, lse)
    want = merge_attention(list(zip(out, lse, strict=True)))
    assert got[0].dtype == jnp.bfloat16
    assert_dtype_close(got[0], want[0], "bfloat16")
    assert_dtype_close(got[1], want[1], "float32")
    assert not got[0][0].any()


def test_one_rank_is_plain_attention():
    query, key, value = (numbers((1, s, 2, 8), s) for s in (1, 6, 7))
    value = value[:, :6]
    out, _ = decode(1, query, key, value, jnp.array([6]), "contiguous")
    assert_dtype_close(out, attention(query, key, value), "float32")


def test_a_length_for_all_rows():
    query, key = numbers((2, 1, 2, 8), 0), numbers((2, 8, 2, 8), 1)
    one = decode(2, query, key, key, jnp.int32(5), "contiguous")
    same_bits(one, decode(2, query, key, key, jnp.array([5, 5]), "contiguous"))


@pytest.mark.parametrize(("placement", "lengths", "error", "message"), [
    ("zigzag", 3, ValueError, "even number of slots per rank; got 3"),
    ("circle", 3, ValueError, "unknown placement 'circle'"),
    ("contiguous", jnp.float32(3), TypeError, "lengths must be integers"),
    ("contiguous", None, TypeError, "lengths must be integers; got None"),
])  # fmt: skip
def test_what_cannot_be_is_refused(unchecked, placement, lengths, error, message):
    def local(query, key):
        return sharded_decode_attention(
            query, key, key, lengths, axis_name="seq", placement=placement
        )

    call = jax.shard_map(local, mesh=mesh_of(2), in_specs=SPECS[:2], out_specs=P(), check_vma=False)
    with pytest.raises(error, match=message):
        jax.eval_shape(call, jnp.ones((1, 1, 1, 8)), jnp.ones((1, 6, 1, 8)))
