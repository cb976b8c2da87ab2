"""The op and its reference, called for a spec."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.pallas_kernels.decode_attention.api import decode_attention
from jaxinfer.pallas_kernels.decode_attention.reference import decode_attention_reference
from tests.metrics import assert_close, assert_dtype_close
from tests.ops.cases import quick_compilation

# Compiled once for all tests of a shape.
_reference = jax.jit(
    decode_attention_reference, static_argnames=("scale", "left_window", "logits_softcap")
)


def reference(*arrays, **options):
    """Output and log-sum-exp, float32."""
    with quick_compilation():
        return _reference(*arrays, **options)


def call_reference(spec, arrays):
    """The same with a spec's options."""
    return reference(
        *arrays, scale=spec.H**-0.5, left_window=spec.local_window_size,
        logits_softcap=spec.logits_softcap,
    )  # fmt: skip


def op(implementation, spec=None, **options):
    """The op with a spec's options, as a function of its arrays: output and log-sum-exp."""
    options = (spec.options if spec else {}) | options
    return functools.partial(
        decode_attention, implementation=implementation, return_residual=True, **options
    )


def check(spec, got, want) -> None:
    """Fail unless output and log-sum-exp agree with the reference's."""
    out, lse = got
    assert out.dtype == spec.dtype
    assert lse.dtype == jnp.float32
    assert_dtype_close(out, want[0], spec.dtype, "out")
    # Products of 16-bit numbers are exact in float32, so the lse differs by summation, and by the
    # approximate exp2 and log2 of the hardware.
    assert_close(lse, want[1], rms=1e-5, max_abs=1e-4, label="lse")


def check_rounding(spec, got, want) -> None:
    """Fail unless two runs that add in different orders agree."""
    for one, other in zip(got, want, strict=True):
        assert_dtype_close(one, np.asarray(other, np.float64), spec.dtype)
