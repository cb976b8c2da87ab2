"""`matmul_and_norm`: a product, the residual stream, and the norm for the next product."""

import math

import jax
from jaxtyping import Array, Float

from jaxinfer.pallas_kernels.add_rms_norm.api import add_rms_norm
from jaxinfer.pallas_kernels.arguments import check_config
from jaxinfer.pallas_kernels.device import current_device
from jaxinfer.pallas_kernels.dispatch import Implementation, choose, is_forced
from jaxinfer.pallas_kernels.matmul import config as configs
from jaxinfer.pallas_kernels.matmul.api import NAME, check, matmul, run_mosaic
from jaxinfer.pallas_kernels.matmul.norm import Norm, Tokens, check_norm
from jaxinfer.pallas_kernels.matmul.shape import Config
from jaxinfer.pallas_kernels.matmul.xla import matmul_xla


def matmul_and_norm(
    x: Float[Array, "*B K"],
    weight: Float[Array, "K N"],
    bias: Float[Array, "N"] | None = None,
    residual: Float[Array, "*B N"] | None = None,
    *,
    norm: Norm,
    implementation: Implementation = None,
    config: Config | None = None,
) -> tuple[Float[Array, "*B N"], Tokens]:
    """Multiply, add the residual stream, and normalise the sum for the next product.

    Args:
        x: `[…, K]` tokens, as for `matmul`.
        weight: `[K, N]`.
        bias: `[N]`.
        residual: `[…, N]` the stream, or None.
        norm: RMSNorm of the sum (Zhang and Sennrich, 2019).
        implementation: Of the product, as for `matmul`. `"mosaic"` by name is one launch; `"xla"`
            by name is all in plain JAX.
        config: As for `matmul`.

    Returns:
        The sum `[…, N]`, and its norm: an array, or an `UndividedNorm` that stands for one.
        `matmul` takes either; `divided` makes an array of either.

    Raises:
        ValueError: as `matmul`; a norm of another width, or its `eps` negative.
        TypeError: as `matmul`; no `Norm`. The norm's weight may have a dtype of its own.
        NotSupported: as `matmul`.

    Numerics: as `matmul`. The norm is that of the rounded sum.

    Where the product has no kernel, or `add_rms_norm` is forced to some implementation, the norm is
    a call of that op.

    >>> import jax.numpy as jnp
    >>> from jaxinfer.pallas_kernels import divided
    >>> stream, normed = matmul_and_norm(
    ...     jnp.ones((2, 3)), jnp.ones((3, 4)), residual=jnp.ones((2, 4)), norm=Norm(jnp.ones(4))
    ... )
    >>> stream[0, 0].item(), round(divided(normed)[0, 0].item(), 3)
    (4.0, 1.0)
    >>> matmul(normed, jnp.ones((4, 8)), gate="silu").shape
    (2, 4)
    """
    check(x, weight, bias, residual, False, None)
    check_config(config, Config)
    K, N = weight.shape
    check_norm(norm, N, "norm")
    plain: Implementation = "xla" if implementation == "xla" else None
    if is_forced("add_rms_norm"):
        product = matmul(x, weight, bias, implementation=implementation, config=config)
    else:
        choice = configs.choose_config(
            current_device(), M=math.prod(x.shape[:-1]), K=K, N=N, gated=False, transposed=False
        )

        def mosaic() -> tuple[jax.Array, Tokens]:
            total, undivided = run_mosaic(
                x, weight, bias, residual, norm, transposed=False, gate=None, config=config,
                choice=choice,
            )  # fmt: skip
            assert undivided is not None, "asked for"
            return total, undivided

        def xla() -> jax.Array:
            return matmul_xla(x, weight, bias)

        chosen = choose(NAME, implementation, {"mosaic": mosaic, "xla": xla}, choice.order)
        if isinstance(chosen, tuple):
            return chosen
        product = chosen
    normed, total = add_rms_norm(product, residual, norm.weight, eps=norm.eps, implementation=plain)
    return total, normed
