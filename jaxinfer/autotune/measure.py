"""Times of XLA and of the kernel's tilings for one call; a wrong result gets no time."""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.autotune.op import Op, Spec
from jaxinfer.pallas_kernels.timing import call_times

_ROUNDS, _CALLS = 3, 20
_SUMMATION = 1e-5  # relative RMS error that the order of summation in float32 may make


class WrongResult(RuntimeError):
    """An implementation computes something else than XLA does in float32."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Times[C]:
    """Median times of one call.

    Attributes:
        xla_us: Of XLA, µs.
        kernel_us: Of the kernel, µs, by tiling.
    """

    xla_us: float
    kernel_us: dict[C, float]


def measure[S: Spec, C](op: Op[S, C], spec: S, tilings: Sequence[C]) -> Times[C]:
    """Check XLA and the kernel's tilings against float32, then time them in turn.

    Between two calls other memory is read, so that none finds its arrays in the L2 cache, as in a
    model, where other layers come in between. All take part in several rounds, so that a clock
    that changes meanwhile does not favour one of them.

    Args:
        op: What is called.
        spec: The sizes.
        tilings: Of the kernel.

    Raises:
        WrongResult: a result is too far from XLA's in float32.
        NotSupported: the kernel cannot serve the call here.
    """
    calls: dict[C | None, Callable[..., Any]] = {None: op.call(spec, implementation="xla")}
    for tiling in tilings:
        calls[tiling] = op.call(spec, implementation="mosaic", config=tiling)
    # Compiled as one, so that no parts of large arrays lie beside them.
    make = jax.jit(functools.partial(op.make_inputs, spec))
    first = make(jax.random.key(0))
    want = jax.jit(op.reference(spec))(*first)
    compiled = {}
    for tiling, call in calls.items():
        compiled[tiling] = jax.jit(call).lower(*first).compile()
        _check(spec, tiling, compiled[tiling](*first), want)
    del want

    times: dict[C | None, list[float]] = {tiling: [] for tiling in compiled}
    for _ in range(_ROUNDS):
        for tiling, function in compiled.items():
            times[tiling] += call_times(
                lambda function=function: function(*first), _CALLS, flush=True
            )
    medians = {tiling: statistics.median(each) for tiling, each in times.items()}
    return Times(
        xla_us=medians[None],
        kernel_us={tiling: us for tiling, us in medians.items() if tiling is not None},
    )


def _check(spec: Spec, tiling: Any, got: jax.Array, want: jax.Array) -> None:
    """Raise WrongResult unless a result is as near to float32's as its dtype can be.

    Rounding to the dtype alone is an error of 0.2 to 0.3 eps in relative RMS; XLA rounds a gated
    product twice, and attention rounds probabilities. Results in float32 differ by the order of
    summation, at a depth of 4096 by 2 eps.
    """
    difference = jnp.linalg.norm((got.astype(jnp.float32) - want).ravel())
    error = float(difference / jnp.linalg.norm(want.ravel()))
    limit = max(float(jnp.finfo(got.dtype).eps), _SUMMATION)
    if not error <= limit:  # not a number is wrong too
        who = "XLA" if tiling is None else f"the kernel with {tiling}"
        raise WrongResult(
            f"{who} computes {spec.name} wrongly: relative RMS error {error:.1e} against XLA in "
            f"float32, at most {limit:.1e} is allowed; nothing was chosen for it"
        )
