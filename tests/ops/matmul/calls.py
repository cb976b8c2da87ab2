"""The op and its reference, called for a spec."""

import functools

import jax
import numpy as np

from jaxinfer.pallas_kernels.matmul.api import matmul
from jaxinfer.pallas_kernels.matmul.reference import matmul_reference
from jaxinfer.pallas_kernels.matmul.specs import MatmulSpec
from tests.metrics import assert_dtype_close
from tests.ops.cases import quick_compilation

_reference = jax.jit(matmul_reference, static_argnames=("transposed", "gate"))


def options(spec: MatmulSpec) -> dict:
    """Keyword arguments of the reference."""
    return {"transposed": spec.transposed, "gate": spec.gate}


def call(spec: MatmulSpec, implementation: str | None, **more):
    """The op with a spec's options."""
    more = {"out_dtype": spec.out_dtype, "implementation": implementation} | more
    return functools.partial(matmul, **options(spec), **more)


def check(spec: MatmulSpec, arrays, got) -> None:
    """Fail unless the result agrees with the reference."""
    assert got.dtype == spec.out_dtype
    with quick_compilation():
        want = np.asarray(_reference(*arrays, **options(spec)))
    # A gate multiplies two numbers, which makes large ones; unit-scale data stay below 4.
    size = max(1.0, np.abs(want).max() / 4) if want.size else 1.0
    assert_dtype_close(np.asarray(got, np.float32) / size, want / size, spec.out_dtype)
