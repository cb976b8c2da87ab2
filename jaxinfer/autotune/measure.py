"""Times of XLA and of the kernel's tilings for one product; a wrong result gets no time."""

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels.matmul.api import matmul
from jaxinfer.pallas_kernels.matmul.mosaic_sm90 import Config
from jaxinfer.pallas_kernels.matmul.reference import matmul_reference
from jaxinfer.pallas_kernels.matmul.specs import MatmulSpec, make_inputs
from jaxinfer.pallas_kernels.timing import COLD_BYTES, call_times

_ROUNDS, _CALLS = 3, 20


class WrongResult(RuntimeError):
    """An implementation computes something else than XLA does in float32."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """Median times of one product.

    Attributes:
        xla_us: Of XLA, µs.
        kernel_us: Of the kernel, µs, by tiling.
    """

    xla_us: float
    kernel_us: dict[Config, float]


def measure(spec: MatmulSpec, tilings: Sequence[Config]) -> Times:
    """Check XLA and the kernel's tilings against float32, then time them in turn.

    Each call takes another copy of the weight, so many that none is left in the L2 cache when its
    turn comes again, as in a model, where other layers come in between. All take part in several
    rounds, so that a clock that changes meanwhile does not favour one of them.

    Args:
        spec: The product.
        tilings: Of the kernel.

    Raises:
        WrongResult: a result is too far from XLA's in float32.
        NotSupported: the kernel cannot compute the product here.
    """
    options = {"transposed": spec.transposed, "gate": spec.gate}
    calls: dict[Config | None, Callable[..., Any]] = {
        None: functools.partial(matmul, **options, implementation="xla")
    }
    for tiling in tilings:
        calls[tiling] = functools.partial(matmul, **options, implementation="mosaic", config=tiling)
    x, first, bias, _ = make_inputs(spec, jax.random.key(0))
    want = jax.jit(functools.partial(matmul_reference, **options))(x, first, bias)
    compiled = {}
    for tiling, call in calls.items():
        compiled[tiling] = jax.jit(call).lower(x, first, bias).compile()
        _check(spec, tiling, compiled[tiling](x, first, bias), want)
    del want

    turn = itertools.cycle([first, *_copies(spec, first.nbytes)])
    times: dict[Config | None, list[float]] = {tiling: [] for tiling in compiled}
    for _ in range(_ROUNDS):
        for tiling, function in compiled.items():
            times[tiling] += call_times(
                lambda function=function: function(x, next(turn), bias), _CALLS, flush=False
            )
    medians = {tiling: statistics.median(each) for tiling, each in times.items()}
    return Times(
        xla_us=medians[None],
        kernel_us={tiling: us for tiling, us in medians.items() if tiling is not None},
    )


def _copies(spec: MatmulSpec, weight_bytes: int) -> list[jax.Array]:
    """Other weights of the product, more than the L2 cache holds."""
    count = -(-COLD_BYTES // weight_bytes)
    keys = jax.random.split(jax.random.key(1), count)
    return jax.block_until_ready([make_inputs(spec, key)[1] for key in keys])


def _check(spec: MatmulSpec, tiling: Config | None, got: jax.Array, want: jax.Array) -> None:
    """Raise WrongResult unless a result is as near to float32's as its dtype can be.

    Rounding to the dtype alone is an error of 0.2 to 0.3 eps in relative RMS, and XLA rounds a
    gated product twice.
    """
    difference = jnp.linalg.norm(got.astype(jnp.float32) - want)
    error, limit = float(difference / jnp.linalg.norm(want)), float(jnp.finfo(got.dtype).eps)
    if not error <= limit:  # not a number is wrong too
        who = "XLA" if tiling is None else f"the kernel with {tiling}"
        raise WrongResult(
            f"{who} computes {spec.name} wrongly: relative RMS error {error:.1e} against XLA in "
            f"float32, at most {limit:.1e} is allowed; nothing was chosen for it"
        )
