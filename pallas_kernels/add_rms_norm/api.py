"""`add_rms_norm`: the public function."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinfer.pallas_kernels.add_rms_norm import config as configs
from jaxinfer.pallas_kernels.add_rms_norm.mosaic_sm90 import THREADS, add_rms_norm_mosaic
from jaxinfer.pallas_kernels.add_rms_norm.xla import add_rms_norm_xla
from jaxinfer.pallas_kernels.arguments import check_arrays
from jaxinfer.pallas_kernels.device import current_device
from jaxinfer.pallas_kernels.dispatch import Implementation, NotSupported, choose

_NAME = "add_rms_norm"


def add_rms_norm(
    x: Float[Array, "*B D"],
    residual: Float[Array, "*B D"] | None,
    weight: Float[Array, "D"],
    *,
    eps: float = 1e-6,
    implementation: Implementation = None,
) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
    """Add the residual stream and normalise the sum by its root mean square.

    RMSNorm (Zhang and Sennrich, 2019): `s = x + residual; s / sqrt(mean(s²) + eps) · weight`.

    Args:
        x: `[…, D]`, what a sub-layer adds to the stream.
        residual: `[…, D]` the stream so far, or None: plain RMSNorm of `x`.
        weight: `[D]`.
        eps: Added to the mean square.
        implementation: `"mosaic"`, `"xla"`, several in order, or None for the measured choice.

    Returns:
        The normalised sum and the sum itself, `[…, D]` in the dtype of `x`.

    Raises:
        ValueError: shapes that do not agree, or `eps` negative.
        TypeError: x and residual of different dtypes, or arguments that are no arrays.
        NotSupported: the implementation asked for by name cannot serve the call.
        ExceptionGroup: several were asked for and none can.

    Numerics: computed in float32; the sum is rounded to the dtype of `x` before it is normalised.

    Memory: `mosaic` reads x, residual and weight once and writes both results.

    >>> normed, total = add_rms_norm(jnp.ones((1, 4)), jnp.ones((1, 4)), jnp.ones(4), eps=0.0)
    >>> normed.tolist(), total.tolist()
    ([[1.0, 1.0, 1.0, 1.0]], [[2.0, 2.0, 2.0, 2.0]])
    """
    check_arrays(x=x, weight=weight)
    if residual is not None:
        check_arrays(residual=residual)
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must have shape {x.shape[-1:]}; got {weight.shape}")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative; got {eps}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have the shape of x {x.shape}; got {residual.shape}")
    if residual is not None and residual.dtype != x.dtype:
        raise TypeError(f"x and residual must have one dtype; got {x.dtype} and {residual.dtype}")

    def mosaic():
        _check_mosaic(x)
        return add_rms_norm_mosaic(x, residual, weight, eps=eps)

    candidates = {
        "mosaic": mosaic,
        "xla": functools.partial(add_rms_norm_xla, x, residual, weight, eps=eps),
    }
    return choose(_NAME, implementation, candidates, configs.PREFERRED)


def _check_mosaic(x) -> None:
    """Raise NotSupported where the kernel cannot serve the call."""
    refuse = functools.partial(NotSupported, _NAME, "mosaic")
    device = current_device()
    if not device.is_hopper:
        raise refuse(f"device {device.name!r}", "Hopper GPUs (compute capability 9.0)")
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise refuse(f"dtype {x.dtype}", "bfloat16, float16")
    if x.shape[-1] % THREADS or x.shape[-1] > 16384:
        raise refuse(f"D = {x.shape[-1]}", f"a multiple of {THREADS}, at most 16384")
    if x.size == 0:
        raise refuse("no rows", "at least one row")
