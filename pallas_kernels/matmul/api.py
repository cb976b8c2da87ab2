"""`matmul`: the public function."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from jaxinfer.pallas_kernels.arguments import check_arrays, check_config, check_dtype
from jaxinfer.pallas_kernels.device import current_device
from jaxinfer.pallas_kernels.dispatch import Implementation, NotSupported, choose
from jaxinfer.pallas_kernels.matmul import config as configs
from jaxinfer.pallas_kernels.matmul.epilogue import GATES, Gate
from jaxinfer.pallas_kernels.matmul.mosaic_sm90 import matmul_mosaic
from jaxinfer.pallas_kernels.matmul.norm import Norm, Tokens, UndividedNorm
from jaxinfer.pallas_kernels.matmul.rotation import Rotation
from jaxinfer.pallas_kernels.matmul.shape import Config
from jaxinfer.pallas_kernels.matmul.xla import matmul_xla

NAME = "matmul"
DIVISION_US = 2.0
"""What a kernel for the division of an `UndividedNorm` takes, with its launch."""


def matmul(
    x: Float[Array, "*B K"] | UndividedNorm,
    weight: Float[Array, "K N"] | Float[Array, "N K"],
    bias: Float[Array, "N"] | None = None,
    residual: Float[Array, "*B out"] | None = None,
    *,
    transposed: bool = False,
    gate: Gate | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: Implementation = None,
    config: Config | None = None,
) -> Float[Array, "*B out"]:
    """Multiply tokens by a weight, with what often follows: a bias, a gate, a residual.

    Made for decoding, where few tokens meet a large weight and reading it takes all the time
    (FlashDecoding++, section 4: flat GEMM). `matmul_and_norm` prepares an RMSNorm as well.

    Args:
        x: `[…, K]` tokens; float32, bfloat16 or float16. Or the norm that `matmul_and_norm`
            returned.
        weight: `[K, N]`, or `[N, K]` if `transposed`; the dtype of x.
        bias: `[N]`, added to the product.
        residual: The shape of the result and the dtype of x, added to it at the end.
        transposed: The weight is stored `[N, K]`.
        gate: The columns are two halves, and the result is `activation(first) · second`:
            `"silu"` or `"gelu_tanh"`.
        out_dtype: Of the result: x's, which is the default, or float32.
        implementation: `"mosaic"`, `"xla"`, several in order, or None for the measured choice.
        config: Tiling of the Mosaic kernel; default: measured, else by heuristic.

    Returns:
        `[…, N]`, or `[…, N/2]` with a gate, in `out_dtype`.

    Raises:
        ValueError: shapes that do not fit together, a gate or an `out_dtype` that there is not, or
            a config that needs more shared memory or registers than there are.
        TypeError: dtypes that differ, or that nothing multiplies; arguments that are no arrays; a
            config of another class.
        NotSupported: the implementation asked for by name cannot serve the call.
        ExceptionGroup: several were asked for and none can.

    Numerics: accumulated in float32. `mosaic` rounds once, after all that follows; `xla` rounds the
    product to `out_dtype` before.

    Memory: `mosaic` reads the weight once, and the tokens once per CTA (from the L2 cache).

    >>> matmul(jnp.ones((2, 3)), jnp.ones((3, 4)), gate="silu").shape
    (2, 2)
    """
    check(x, weight, bias, residual, transposed, gate)
    check_config(config, Config)
    dtype = _result_dtype(x.dtype, out_dtype)
    K, N = weight.shape[::-1] if transposed else weight.shape
    M, gated = math.prod(x.shape[:-1]), gate is not None
    choice = configs.choose_config(
        current_device(), M=M, K=K, N=N, gated=gated, transposed=transposed, cast=dtype != x.dtype
    )
    order = choice.order
    if isinstance(x, UndividedNorm) and choice.slower_us < DIVISION_US:
        order = ("mosaic", "xla")
    arrays = (x, weight, bias, residual)
    options: dict[str, Any] = {"transposed": transposed, "gate": gate, "out_dtype": dtype}

    def mosaic() -> jax.Array:
        return run_mosaic(*arrays, config=config, choice=choice, **options)[0]

    candidates = {
        "mosaic": mosaic,
        "xla": functools.partial(matmul_xla, *arrays, **options),
    }
    return choose(NAME, implementation, candidates, order)


def _result_dtype(dtype: jnp.dtype, wanted: DTypeLike | None) -> jnp.dtype:
    try:
        found = dtype if wanted is None else jnp.dtype(wanted)
    except TypeError:  # no dtype at all
        found = None
    if found is None or found not in (dtype, jnp.float32):
        raise ValueError(f"out_dtype must be float32 or that of x, {dtype}; got {wanted!r:.80}")
    return found


def run_mosaic(
    x: Tokens,
    weight: jax.Array,
    bias: jax.Array | None,
    residual: jax.Array | None,
    norm: Norm | None = None,
    rotation: Rotation | None = None,
    *,
    transposed: bool,
    gate: Gate | None,
    out_dtype: DTypeLike | None = None,
    config: Config | None,
    choice: configs.Preference,
) -> tuple[jax.Array, Any]:
    """The product, and what goes with it, by the kernel; NotSupported where it cannot serve.

    Arguments and results are those of `matmul_mosaic`.
    """
    K, N = weight.shape[::-1] if transposed else weight.shape
    M, device = math.prod(x.shape[:-1]), current_device()
    dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    gated = gate is not None
    tiles = dtype.itemsize // 2 + (residual is not None) + (norm is not None)
    if rotation is not None:
        heads = rotation.heads
        gated = heads.banks == 2  # as many weights as with a gate
        tiles = heads.tiles
    beside: dict[str, Any] = {
        "tiles": tiles,
        "sums": norm is not None
        or isinstance(x, UndividedNorm)
        or (rotation is not None and rotation.q_norm is not None),
    }
    tiling = config or configs.with_room(choice.config, device, M=M, gated=gated, **beside)
    _check_mosaic(x, norm, M=M, K=K, out_n=N // 2 if gated else N, config=tiling)
    assert tiling is not None, "checked by _check_mosaic"
    configs.check_fits(tiling, device, M=M, gated=gated, **beside)
    with jax.enable_x64(False):  # loops of the kernel count in int32
        return matmul_mosaic(
            x, weight, bias, residual, norm, rotation, transposed=transposed, gate=gate,
            out_dtype=dtype, config=tiling, num_sms=device.num_sms,
        )  # fmt: skip


def _check_mosaic(x, norm, *, M: int, K: int, out_n: int, config: Config | None) -> None:
    """Raise NotSupported where the kernel cannot serve the call."""
    refuse = functools.partial(NotSupported, NAME, "mosaic")
    device = current_device()
    if not device.is_hopper:
        raise refuse(f"device {device.name!r}", "Hopper GPUs (compute capability 9.0)")
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise refuse(f"dtype {x.dtype}", "bfloat16, float16")
    if norm is not None and x.dtype != jnp.bfloat16:
        raise refuse(f"a norm in {x.dtype}, which may overflow undivided", "bfloat16")
    if not 1 <= M <= configs.MAX_ROWS:
        raise refuse(f"{M} tokens", f"1 to {configs.MAX_ROWS}")
    if config is None:
        raise refuse(f"{M} tokens in the shared memory of {device.name!r}", "fewer tokens")
    if K % config.block_k or out_n % config.block_n:
        raise refuse(
            f"K = {K} and {out_n} columns", f"multiples of {config.block_k} and {config.block_n}"
        )
    if K // config.block_k < config.split:
        raise refuse(f"K = {K}, split {config.split} times", f"{config.split * config.block_k}")


def check(x, weight, bias, residual, transposed, gate) -> None:
    """Raise ValueError or TypeError for arguments that no implementation takes."""
    check_arrays(x=x, weight=weight)
    check_arrays(**{k: v for k, v in {"bias": bias, "residual": residual}.items() if v is not None})
    check_dtype("x", x)
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
