"""`matmul`: the public function."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinfer.pallas_kernels import plgpu
from jaxinfer.pallas_kernels.device import current_device
from jaxinfer.pallas_kernels.dispatch import Implementation, NotSupported, choose
from jaxinfer.pallas_kernels.matmul import config as configs
from jaxinfer.pallas_kernels.matmul.epilogue import GATES, Gate
from jaxinfer.pallas_kernels.matmul.mosaic_sm90 import Config, matmul_mosaic
from jaxinfer.pallas_kernels.matmul.xla import matmul_xla

_NAME = "matmul"


def matmul(
    x: Float[Array, "*B K"],
    weight: Float[Array, "K N"] | Float[Array, "N K"],
    bias: Float[Array, "N"] | None = None,
    residual: Float[Array, "*B out"] | None = None,
    *,
    transposed: bool = False,
    gate: Gate | None = None,
    implementation: Implementation = None,
    config: Config | None = None,
) -> Float[Array, "*B out"]:
    """Multiply tokens by a weight, with what often follows: a bias, a gate, a residual.

    Made for decoding, where few tokens meet a large weight and reading it takes all the time
    (FlashDecoding++, section 4: flat GEMM).

    Args:
        x: `[…, K]` tokens; float32, bfloat16 or float16.
        weight: `[K, N]`, or `[N, K]` if `transposed`; the dtype of x.
        bias: `[N]`, added to the product.
        residual: The shape and dtype of the result, added to it at the end.
        transposed: The weight is stored `[N, K]`.
        gate: The columns are two halves, and the result is `activation(first) · second`:
            `"silu"` or `"gelu_tanh"`.
        implementation: `"mosaic"`, `"xla"`, several in order, or None for the measured choice.
        config: Tiling of the Mosaic kernel; default: measured, else by heuristic.

    Returns:
        `[…, N]`, or `[…, N/2]` with a gate, in the dtype of x.

    Raises:
        ValueError: shapes that do not fit together, a gate that does not exist, or a config that
            needs more shared memory than the device has.
        TypeError: dtypes that differ.
        NotSupported: the implementation asked for by name cannot serve the call.
        ExceptionGroup: several were asked for and none can.

    Numerics: accumulated in float32. `mosaic` rounds once, after all that follows; `xla` rounds the
    product before.

    Memory: `mosaic` reads the weight once, and the tokens once per CTA (from the L2 cache).

    >>> matmul(jnp.ones((2, 3)), jnp.ones((3, 4)), gate="silu").shape
    (2, 2)
    """
    _check(x, weight, bias, residual, transposed, gate)
    K, N = weight.shape[::-1] if transposed else weight.shape
    M = math.prod(x.shape[:-1])
    device = current_device()
    choice = configs.choose_config(
        device, M=M, K=K, N=N, gated=gate is not None, transposed=transposed
    )
    arrays, options = (x, weight, bias, residual), {"transposed": transposed, "gate": gate}

    def mosaic():
        tiling = config or choice.config
        if config is None and residual is not None:
            tiling = configs.with_room_for_residual(tiling, device, M=M, gated=gate is not None)
        _check_mosaic(x, M=M, K=K, out_n=N if gate is None else N // 2, config=tiling)
        assert tiling is not None, "checked by _check_mosaic"
        configs.check_fits(
            tiling, device, M=M, gated=gate is not None, with_residual=residual is not None
        )
        return matmul_mosaic(*arrays, **options, config=tiling, num_sms=device.num_sms)

    candidates = {
        "mosaic": mosaic,
        "xla": functools.partial(matmul_xla, *arrays, **options),
    }
    return choose(_NAME, implementation, candidates, choice.order)


def _check_mosaic(x, *, M: int, K: int, out_n: int, config: Config | None) -> None:
    """Raise NotSupported where the kernel cannot serve the call."""
    refuse = functools.partial(NotSupported, _NAME, "mosaic")
    device = current_device()
    if not device.is_hopper:
        raise refuse(f"device {device.name!r}", "Hopper GPUs (compute capability 9.0)")
    if not plgpu.lowers_transposed_stores():
        raise refuse(f"JAX {jax.__version__}", "JAX 0.11")
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise refuse(f"dtype {x.dtype}", "bfloat16, float16")
    if not 1 <= M <= configs.MAX_ROWS:
        raise refuse(f"{M} tokens", f"1 to {configs.MAX_ROWS}")
    if config is None:
        raise refuse(f"{M} tokens in the shared memory of {device.name!r}", "fewer tokens")
    if K % config.block_k or out_n % config.block_n:
        raise refuse(
            f"K = {K} and {out_n} columns", f"multiples of {config.block_k} and {config.block_n}"
        )


def _check(x, weight, bias, residual, transposed, gate) -> None:
    if weight.ndim != 2:
        raise ValueError(f"weight must have 2 dimensions; got shape {weight.shape}")
    K, N = weight.shape[::-1] if transposed else weight.shape
    if x.ndim < 1 or x.shape[-1] != K:
        raise ValueError(f"the last dimension of x must be K = {K}; got shape {x.shape}")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias must have shape ({N},); got {bias.shape}")
    if gate is not None and gate not in GATES:
        raise ValueError(f"gate must be among {GATES}; got {gate!r}")
    if gate is not None and N % 2:
        raise ValueError(f"a gated weight must have an even number of columns; got N = {N}")
    result = (*x.shape[:-1], N if gate is None else N // 2)
    if residual is not None and residual.shape != result:
        raise ValueError(f"residual must have the result's shape {result}; got {residual.shape}")
    others = [weight, *(array for array in (bias, residual) if array is not None)]
    if any(array.dtype != x.dtype for array in others):
        raise TypeError(
            f"x, weight, bias and residual must have one dtype; got {x.dtype} and "
            f"{', '.join(str(array.dtype) for array in others)}"
        )
