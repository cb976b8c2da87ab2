"""The reference of `rope_kv_write`, and comparing the four results."""

import jax
import numpy as np

from jaxinfer.pallas_kernels.rope_kv_write.reference import rope_kv_write_reference
from tests.metrics import assert_dtype_close
from tests.ops.cases import quick_compilation

RESULTS = ("q", "k", "k_pages", "v_pages")


def call_reference(*arrays):
    """Compiled once; tables and counts stay numbers."""
    tables = [np.asarray(x) for x in arrays[7:]]
    with quick_compilation():
        return jax.jit(lambda *floats: rope_kv_write_reference(*floats, *tables))(*arrays[:7])


def check(spec, got, want, *, dtype=None) -> None:
    """Fail unless rotated q and k and both pools agree, within the rounding of `dtype`."""
    for one, expected, label in zip(got, want, RESULTS, strict=True):
        assert one.dtype == spec.dtype, label
        assert_dtype_close(one, expected, dtype or spec.dtype, label)
