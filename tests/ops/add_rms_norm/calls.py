"""The op and its reference, called for a spec."""

import functools

import jax

from jaxinfer.pallas_kernels.add_rms_norm.api import add_rms_norm
from jaxinfer.pallas_kernels.add_rms_norm.reference import add_rms_norm_reference
from tests.metrics import assert_dtype_close

xla = jax.jit(functools.partial(add_rms_norm, implementation="xla"), static_argnames="eps")
mosaic = functools.partial(add_rms_norm, implementation="mosaic")


def check(arrays, got, *, eps: float = 1e-6) -> None:
    """Fail unless the normalised sum and the sum agree with the reference."""
    want = add_rms_norm_reference(*arrays, eps=eps)
    for one, expected, label in zip(got, want, ("normed", "total"), strict=True):
        assert one.dtype == arrays[0].dtype, label
        assert_dtype_close(one, expected, one.dtype, label)
