"""The op and its reference, called for a spec."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels.attention.api import attention
from jaxinfer.pallas_kernels.attention.mask import Visibility
from jaxinfer.pallas_kernels.attention.reference import attention_reference
from tests.metrics import assert_close, assert_dtype_close
from tests.ops.cases import quick_compilation

# Under jit a case compiles once; op by op it would compile forty times.
_call = jax.jit(
    attention,
    static_argnames=(
        "scale", "is_causal", "local_window_size", "logits_softcap", "return_residual",
        "implementation",
    ),
)  # fmt: skip


def xla(*arrays, **options) -> jax.Array:
    """Output of the plain-JAX implementation; offsets and lengths are arrays."""
    return _call(*arrays, **options, implementation="xla")


def xla_residual(*arrays, **options) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp of the plain-JAX implementation."""
    return _call(*arrays, **options, implementation="xla", return_residual=True)


def visibility(spec) -> Visibility:
    """The rule that `attention` makes of a spec's options."""
    options = spec.options
    window = options["local_window_size"]
    left, right = (window, window) if window is None or isinstance(window, int) else window
    offset = options["q_offset"]
    return Visibility(
        is_causal=spec.is_causal, left=left, right=right,
        q_offset=jnp.zeros(spec.B, jnp.int32) if offset is None else offset,
        query_lengths=options["query_seq_lengths"],
        key_lengths=options["key_value_seq_lengths"],
    )  # fmt: skip


def call_reference(spec, arrays):
    """Output and log-sum-exp, float32."""
    reference = functools.partial(
        attention_reference, visibility=visibility(spec), scale=spec.H**-0.5,
        logits_softcap=spec.logits_softcap,
    )  # fmt: skip
    with quick_compilation():
        return jax.jit(reference)(*arrays)


def check(spec, arrays, implementation, *, residual=True) -> None:
    """Fail unless an implementation agrees with the reference."""
    want_out, want_lse = call_reference(spec, arrays)
    options: dict[str, Any] = spec.options | {"implementation": implementation}
    if not residual:
        out = _call(*arrays, **options)
        assert out.dtype == spec.dtype
        assert_dtype_close(out, want_out, spec.dtype, "out")
        return
    out, lse = _call(*arrays, **options, return_residual=True)
    assert out.dtype == spec.dtype
    assert lse.dtype == jnp.float32
    assert_dtype_close(out, want_out, spec.dtype, "out")
    # Products of 16-bit numbers are exact in float32, so the lse differs by summation only.
    assert_close(lse, want_lse, rms=1e-5, max_abs=1e-4, label="lse")
