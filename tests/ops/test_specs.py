"""Specs: unique names, inputs of the stated shapes, and counts that equal counting one by one."""

import math

import jax
import numpy as np
import pytest

from jaxinfer.pallas_kernels.add_rms_norm import specs as norm
from jaxinfer.pallas_kernels.attention import specs as dense
from jaxinfer.pallas_kernels.decode_attention import specs as decode
from jaxinfer.pallas_kernels.matmul import specs as product
from jaxinfer.pallas_kernels.rope_kv_write import specs as rope
from tests.ops.cases import cases, shapes_of

OPS = {"add_rms_norm": norm, "attention": dense, "decode_attention": decode,
       "matmul": product, "rope_kv_write": rope}  # fmt: skip
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


@every_op
def test_names_are_unique_and_lower_case(op):
    names = [spec.name for spec in op.SPECS]
    assert len(set(names)) == len(names)
    assert all(name == name.lower() and name.split()[0] == spec.model
               for name, spec in zip(names, op.SPECS, strict=True))  # fmt: skip


@every_op
def test_there_are_cases_for_tests_and_for_reports(op):
    assert {"ci", "primary"} <= {spec.tag for spec in op.SPECS}


@every_op
def test_inputs_are_reproducible_and_differ_by_key(op):
    spec = next(spec for spec in op.SPECS if spec.tag == "ci")
    same, again, other = (op.make_inputs(spec, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(same[0], again[0])
    assert not np.array_equal(same[0], other[0])


def nbytes(array) -> int:
    return math.prod(array.shape) * array.dtype.itemsize


def seen_by(position, length, *, causal, window):
    """Keys that a query sees, one by one."""
    left, right = (window, window) if window is None or isinstance(window, int) else window
    return [
        key for key in range(length)
        if (not causal or key <= position)
        and (left is None or position - left <= key)
        and (right is None or key <= position + right)
    ]  # fmt: skip


@pytest.mark.parametrize("spec", cases(dense.SPECS, "ci"))
def test_attention_counts(spec):
    pairs, keys, queries = 0, 0, 0
    for b in range(spec.B):
        held = spec.key_lengths[b] if spec.key_lengths else spec.num_keys
        seen = [
            seen_by((spec.q_offset[b] if spec.q_offset else 0) + t, held,
                    causal=spec.is_causal, window=spec.local_window_size)
            for t in range(spec.query_lengths[b] if spec.query_lengths else spec.T)
        ]  # fmt: skip
        pairs += sum(map(len, seen))
        keys += len(set().union(*seen))
        queries += sum(1 for one in seen if one)
    size = np.dtype(spec.dtype).itemsize
    out = spec.B * spec.T * spec.N
    assert dense.count_flops(spec) == 2 * 2 * pairs * spec.N * spec.H
    assert dense.count_bytes(spec) == size * spec.H * (2 * keys * spec.K + queries * spec.N + out)


@pytest.mark.parametrize("spec", cases(decode.SPECS, "ci"))
def test_decode_counts(spec):
    pairs, keys = 0, 0
    for length in spec.row_lengths().tolist():
        window = None if spec.local_window_size is None else (spec.local_window_size, 0)
        seen = [
            seen_by(length - spec.T + t, length, causal=True, window=window) for t in range(spec.T)
        ]
        pairs += sum(map(len, seen))
        keys += len(set().union(*seen))
    query = shapes_of(decode.make_inputs, spec)[0]
    kv = 2 * keys * spec.K * spec.H * query.dtype.itemsize
    assert decode.visible_keys(spec) == keys
    assert decode.count_flops(spec) == 2 * 2 * pairs * spec.N * spec.H
    assert decode.count_bytes(spec) == kv + 2 * nbytes(query)


@pytest.mark.parametrize("spec", cases(rope.SPECS, "ci"))
def test_rope_counts(spec):
    q, k, v, cos, sin, *_ = shapes_of(rope.make_inputs, spec)
    written = sum(2 * spec.K * spec.H for b in range(spec.B) for _ in range(spec.counts[b]))
    moved = 2 * nbytes(q) + 2 * nbytes(k) + nbytes(v) + nbytes(cos) + nbytes(sin)
    assert rope.count_bytes(spec) == moved + written * q.dtype.itemsize
    pairs = (math.prod(q.shape) + math.prod(k.shape)) // 2
    assert rope.count_flops(spec) == pairs * (4 + 2)  # products and sums of a rotation


@pytest.mark.parametrize("spec", cases(norm.SPECS, "ci"))
def test_norm_counts(spec):
    x, residual, weight = shapes_of(norm.make_inputs, spec)
    results = 2 if spec.residual else 1
    inputs = sum(nbytes(array) for array in (x, residual, weight) if array is not None)
    assert norm.count_bytes(spec) == inputs + results * nbytes(x)
    each = 4 + spec.residual  # add; square and sum; scale and weight
    assert norm.count_flops(spec) == each * spec.M * spec.D


def test_primary_decode_lengths_are_ragged_within_their_bounds():
    spec = next(s for s in decode.SPECS if s.lengths == "ragged" and s.B == 64)
    lengths = spec.row_lengths()
    assert lengths.min() >= 100
    assert lengths.max() <= spec.S
    assert len(set(lengths.tolist())) > 32
    np.testing.assert_array_equal(lengths, spec.row_lengths())


@pytest.mark.parametrize("op", [decode, rope], ids=["decode_attention", "rope_kv_write"])
def test_page_tables_name_every_page_once(op):
    spec = [spec for spec in op.SPECS if spec.tag == "ci"][1]
    arrays = op.make_inputs(spec, jax.random.key(0))
    table, pool = arrays[3 if op is decode else 7], arrays[1 if op is decode else 5]
    assert sorted(np.asarray(table).ravel().tolist()) == list(range(len(pool)))


@pytest.mark.parametrize("spec", cases(product.SPECS))
def test_matmul_counts(spec):
    shapes = shapes_of(product.make_inputs, spec)
    out = spec.N // (2 if spec.gate else 1)
    moved = sum(nbytes(shape) for shape in shapes if shape is not None)
    assert product.count_bytes(spec) == moved + spec.M * out * np.dtype(spec.out_dtype).itemsize
    assert product.count_flops(spec) == 2 * spec.M * spec.K * spec.N
