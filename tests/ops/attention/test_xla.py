"""`attention` in plain JAX: blocks, padding, masks, extremes, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxinfer.pallas_kernels.attention.api import attention
from jaxinfer.pallas_kernels.attention.specs import SPECS, AttentionSpec, make_inputs
from jaxinfer.pallas_kernels.attention.xla import K_BLOCK, Q_BLOCK
from tests.metrics import assert_dtype_close
from tests.ops import oracle
from tests.ops.attention.calls import call_reference, check, xla, xla_residual
from tests.ops.cases import cases, inputs, normal, same_bits


@pytest.mark.parametrize("spec", cases(SPECS, "ci"))
def test_matches_reference(spec):
    check(spec, inputs(make_inputs, spec, 2), "xla")


@pytest.mark.gpu
@pytest.mark.parametrize("spec", cases([s for s in SPECS if s.tag == "primary" and s.T <= 2048]))
def test_matches_reference_at_model_shapes(spec):
    check(spec, inputs(make_inputs, spec, 2), "xla")


@pytest.mark.parametrize(("N", "K", "H"), [
    (9, 3, 64), (14, 2, 64), (4, 1, 256), (16, 1, 8), (5, 5, 8), (1, 1, 1), (3, 1, 7),
])  # fmt: skip
def test_head_counts(N, K, H):
    spec = AttentionSpec(model="heads", B=2, T=19, S=31, N=N, K=K, H=H, q_offset=(12, 0),
                         dtype="float32")  # fmt: skip
    check(spec, inputs(make_inputs, spec, 3), "xla")


@pytest.mark.parametrize("T", [1, 511, 512, 513, 1025])
def test_lengths_around_the_block_sizes(T):
    spec = AttentionSpec(model="blocks", B=1, T=T, N=2, K=1, H=8, dtype="float32")
    check(spec, inputs(make_inputs, spec, 4), "xla")


@pytest.mark.parametrize("S", [1, 1023, 1024, 1025, 2100])
def test_key_counts_around_the_block_sizes(S):
    spec = AttentionSpec(model="blocks", B=2, T=3, S=S, N=2, K=1, H=8, is_causal=False,
                         key_lengths=(S, S // 2), dtype="float32")  # fmt: skip
    check(spec, inputs(make_inputs, spec, 5), "xla")


@pytest.mark.parametrize("size", [1e-3, 30.0])
def test_extreme_scales(size):
    """Nearly equal weights, and one key that takes all."""
    query, key, value = (normal(i, (1, 40, 2, 16), size=size) for i in range(3))
    got = xla(query, key, value, is_causal=True)
    want, _ = oracle.attention(query, key, value, is_causal=True)
    assert_dtype_close(got / size, want / size, "float32")


def test_rows_without_keys_are_zero():
    """Before the first key, past the lengths, and with no keys at all."""
    query, key, value = (normal(i, (3, 4, 2, 8)) for i in range(3))
    out, lse = xla_residual(
        query, key, value, is_causal=True, q_offset=jnp.array([-2, 0, 0]),
        query_seq_lengths=jnp.array([4, 1, 4]), key_value_seq_lengths=jnp.array([4, 4, 0]),
    )  # fmt: skip
    empty = np.zeros((3, 4), bool)
    empty[0, :2] = empty[1, 1:] = empty[2] = True
    assert not np.isnan(out).any()
    np.testing.assert_array_equal((np.asarray(out) == 0).all(axis=(2, 3)), empty)
    np.testing.assert_array_equal(np.isneginf(lse).all(axis=2), empty)
    np.testing.assert_array_equal(np.isneginf(lse).any(axis=2), empty)


def test_a_window_that_ends_before_the_keys():
    """Whole blocks are hidden from late queries."""
    spec = AttentionSpec(model="window", B=1, T=4, S=2500, N=2, K=1, H=8, dtype="float32",
                         q_offset=(2496,), local_window_size=(3, 0))  # fmt: skip
    check(spec, inputs(make_inputs, spec, 6), "xla")


def test_padding_may_hold_anything():
    """NaN past a row's keys changes no bit."""
    query, key, value = (normal(i, (2, 5, 2, 8), "bfloat16") for i in range(3))
    lengths = jnp.array([3, 5])
    dirty_key, dirty_value = key.at[0, 3:].set(jnp.nan), value.at[0, 3:].set(jnp.nan)
    clean = xla(query, key, value, key_value_seq_lengths=lengths)
    dirty = xla(query, dirty_key, dirty_value, key_value_seq_lengths=lengths)
    np.testing.assert_array_equal(np.asarray(dirty), np.asarray(clean))


def temporary_bytes(call, T: int) -> int:
    """Scratch of one compiled call over T tokens."""
    shape = jax.ShapeDtypeStruct((1, T, 2, 64), jnp.bfloat16)
    analysis = jax.jit(call).lower(shape, shape, shape).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


@pytest.mark.parametrize("call", [
    lambda *qkv: xla(*qkv, is_causal=True),
    lambda *qkv: xla(*qkv, is_causal=True, local_window_size=511),
    lambda *qkv: xla_residual(*qkv, is_causal=True),
], ids=["plain", "window", "residual"])  # fmt: skip
def test_memory_is_linear(call):
    small, large = temporary_bytes(call, 16384), temporary_bytes(call, 65536)
    assert large <= 4.5 * small
    assert large < 65536**2 / 8  # scores of the two heads alone are 32 times as large


def test_memory_of_gradients_is_linear():
    """Logits of a block are computed again."""

    def call(*qkv):
        return jax.grad(lambda *qkv: xla(*qkv, is_causal=True).sum(), argnums=(0, 1, 2))(*qkv)

    small, large = temporary_bytes(call, 8192), temporary_bytes(call, 32768)
    assert large <= 4.5 * small


@pytest.mark.parametrize("options", [
    {},
    {"is_causal": True},
    {"is_causal": True, "local_window_size": (300, 0), "logits_softcap": 2.0},
    {"is_causal": True, "q_offset": (900,), "key_value_seq_lengths": (1940,)},
], ids=["full", "causal", "window", "offset"])  # fmt: skip
def test_gradients(options):
    """Several blocks of queries and of keys, some of them not seen."""
    T, S = 1040, 2080 if "q_offset" in options else 1040
    spec = AttentionSpec(model="gradients", B=1, T=T, S=S, N=2, K=1, H=8, dtype="float32",
                         is_causal=options.get("is_causal", False),
                         local_window_size=options.get("local_window_size"),
                         logits_softcap=options.get("logits_softcap"),
                         q_offset=options.get("q_offset"),
                         key_lengths=options.get("key_value_seq_lengths"))  # fmt: skip
    assert T > 2 * Q_BLOCK
    assert S > K_BLOCK
    arrays = inputs(make_inputs, spec, 7)
    cotangent = normal(8, (1, T, 2, 8))

    def loss(call):
        return lambda *qkv: (call(*qkv)[0] * cotangent + call(*qkv)[1][..., None]).sum()

    def gradients(call):
        return jax.jit(jax.grad(loss(call), argnums=(0, 1, 2)))(*arrays)

    got = gradients(lambda *qkv: attention(
        *qkv, **spec.options, implementation="xla", return_residual=True
    ))  # fmt: skip
    want = gradients(lambda *qkv: call_reference(spec, qkv))
    for one, other in zip(got, want, strict=True):
        assert_dtype_close(one, other, "float32")


def test_devices_may_see_different_blocks():
    """Inside `shard_map`, which checks what may differ between devices."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("heads",))
    arrays = [normal(i, (1, 1040, 2, 8)) for i in range(3)]

    def both(call):
        return jax.grad(lambda *qkv: call(*qkv).sum())(*arrays), call(*arrays)

    def plain(*qkv):
        return xla(*qkv, is_causal=True, q_offset=jnp.array([3]))

    spec = P(None, None, "heads")
    divided = jax.shard_map(plain, mesh=mesh, in_specs=spec, out_specs=spec)
    same_bits(both(jax.jit(divided)), both(plain))


def test_lengths_do_not_recompile():
    traces = []

    @jax.jit
    def call(x, lengths):
        traces.append(1)
        return xla(
            x, x, x, is_causal=True, q_offset=lengths, query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
        )  # fmt: skip

    x = normal(0, (2, 8, 2, 8))
    for lengths in ([8, 3], [0, 1]):
        call(x, jnp.array(lengths))
    assert len(traces) == 1


@pytest.mark.parametrize("offset", [0, 700])
@pytest.mark.parametrize("window", [None, 300])
def test_blocks_that_no_query_sees_are_not_computed(offset, window):
    """NaN there would show."""
    query, key, value = (normal(i, (1, size, 1, 8)) for i, size in enumerate((600, 4096, 4096)))
    last = offset + 600
    key, value = (x.at[:, K_BLOCK * -(-last // K_BLOCK) :].set(jnp.nan) for x in (key, value))
    out = attention(
        query, key, value, is_causal=True, q_offset=jnp.array([offset]), implementation="xla",
        local_window_size=None if window is None else (window, 0),
    )  # fmt: skip
    assert np.isfinite(out).all()
