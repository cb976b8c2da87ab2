"""`ulysses_attention` by itself; with a ring it is tested through the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxinfer.sharding import ulysses_attention
from jaxinfer.sharding.sequence_parallel.ulysses import share_heads
from tests.ops.cases import quick_compilation
from tests.sharding.eight_devices.runs import check, mesh_of, qkv


def shards(n, **options):
    return jax.shard_map(
        lambda *arrays: ulysses_attention(*arrays, axis_name="seq", **options),
        mesh=mesh_of(n), in_specs=P(None, "seq"), out_specs=P(None, "seq"), check_vma=False,
    )  # fmt: skip


@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize(("N", "K"), [(9, 3), (8, 8), (8, 1), (1, 1)])
def test_any_number_of_heads(n, N, K):
    arrays, lengths = qkv(n * 3, N, K), np.array([n * 3 - 1, 2])
    for is_causal in (True, False):
        call = shards(n, is_causal=is_causal, lengths=jnp.asarray(lengths), return_residual=True)
        with quick_compilation():
            result = jax.jit(call)(*arrays)
        check(result, arrays, lengths, is_causal=is_causal)


def test_output_alone():
    arrays = qkv(4, 2, 2)
    out = jax.jit(shards(2, scale=0.3))(*arrays)
    assert isinstance(out, jax.Array)


@pytest.mark.parametrize(("N", "K", "n", "want"), [
    (32, 8, 8, (1, 8)),  # divides
    (32, 8, 16, (2, 16)),  # each KV head twice, with two query heads each
    (9, 3, 2, (3, 10)),  # five query heads per rank; one is of zeros
    (9, 3, 8, (3, 16)),  # two per rank
    (8, 1, 4, (4, 4)),
    (5, 5, 2, (1, 6)),
    (1, 1, 8, (1, 8)),
])  # fmt: skip
def test_shares(N, K, n, want):
    assert share_heads(N, K, n) == want


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"schedule": "ring"}, ValueError, "schedule need ring_axis; got ring_axis=None"),
    ({"ring_axis": "seq", "ring": 1}, TypeError, "ring"),
    ({"scale": float("inf")}, ValueError, "scale must be finite"),
    ({"lengths": jnp.ones(3, jnp.int32)}, ValueError, r"scalar or \[B\]"),
])  # fmt: skip
def test_what_cannot_be_is_refused(unchecked, options, error, message):
    with pytest.raises(error, match=message):
        jax.eval_shape(shards(2, **options), *qkv(4, 2, 2))
