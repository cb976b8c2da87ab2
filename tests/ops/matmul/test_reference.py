"""The reference of `matmul` against float64, and plain JAX against the reference."""

import dataclasses

import pytest

from jaxinfer.pallas_kernels.matmul.reference import matmul_reference
from jaxinfer.pallas_kernels.matmul.specs import SPECS, MatmulSpec, make_inputs
from tests.metrics import assert_dtype_close
from tests.ops import oracle
from tests.ops.cases import cases, inputs
from tests.ops.matmul.calls import call, check, options


@pytest.mark.parametrize("spec", cases(SPECS, "ci"))
def test_matches_float64(spec):
    arrays = inputs(make_inputs, dataclasses.replace(spec, dtype="float32"), 1)
    want = oracle.matmul(*arrays, **options(spec))
    assert_dtype_close(matmul_reference(*arrays, **options(spec)), want, "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("spec", cases(SPECS, "ci"))
def test_xla_matches_reference(spec, dtype):
    spec = dataclasses.replace(spec, dtype=dtype)
    arrays = inputs(make_inputs, spec, 2)
    check(spec, arrays, call(spec, "xla")(*arrays))


@pytest.mark.parametrize(("M", "K", "N"), [(1, 1, 2), (7, 63, 10), (130, 5, 6), (0, 4, 4)])
def test_xla_takes_any_size(M, K, N):
    spec = MatmulSpec(model="odd", M=M, K=K, N=N, gate="silu", bias=True, dtype="float32")
    arrays = inputs(make_inputs, spec, 3)
    check(spec, arrays, call(spec, "xla")(*arrays))
