"""`project_rope_write`: the projection to queries, keys and values, rotation and cache write."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.pallas_kernels.add_rms_norm.api import add_rms_norm
from jaxinfer.pallas_kernels.arguments import check_config, check_ranks
from jaxinfer.pallas_kernels.device import current_device
from jaxinfer.pallas_kernels.dispatch import Implementation, NotSupported, choose, is_forced
from jaxinfer.pallas_kernels.matmul import config as configs
from jaxinfer.pallas_kernels.matmul.api import check, matmul, run_mosaic
from jaxinfer.pallas_kernels.matmul.norm import Norm, UndividedNorm, check_norm
from jaxinfer.pallas_kernels.matmul.rotation import HEAD_DIMS, Heads, Rotation
from jaxinfer.pallas_kernels.matmul.shape import Config
from jaxinfer.pallas_kernels.rope_kv_write import config as configs_of_rope
from jaxinfer.pallas_kernels.rope_kv_write.api import check_shapes, rope_kv_write
from jaxinfer.pallas_kernels.rope_kv_write.places import places

NAME = "project_rope_write"


def project_rope_write(
    x: Float[Array, "B 1 D"] | UndividedNorm,
    weight: Float[Array, "D columns"],
    bias: Float[Array, "columns"] | None,
    cos: Float[Array, "B 1 half"],
    sin: Float[Array, "B 1 half"],
    k_pages: Float[Array, "P K p H"],
    v_pages: Float[Array, "P K p H"],
    page_table: Int[Array, "B M"],
    start: Int[Array, "B"],
    num_tokens: Int[Array, "B"],
    *,
    num_heads: int,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    implementation: Implementation = None,
    config: Config | None = None,
) -> tuple[Float[Array, "B 1 N H"], Float[Array, "P K p H"], Float[Array, "P K p H"]]:
    """Project one token per request, rotate its queries and keys, and write its keys and values.

    `matmul`, RMSNorms of heads if the model has them, and `rope_kv_write`; or all in one launch.

    Args:
        x: `[B, 1, D]` tokens, or a norm that the product still has to divide.
        weight: `[D, (N + 2·K)·H]`, columns of queries, keys, values.
        bias: `[(N + 2·K)·H]`, or None.
        cos: As for `rope_kv_write`, and so are the arguments up to `num_tokens`.
        sin: `[B, 1, H/2]`.
        k_pages: `[P, K, p, H]`.
        v_pages: `[P, K, p, H]`.
        page_table: `[B, M]`.
        start: `[B]`; a token outside the table or the pool is written nowhere, as there.
        num_tokens: `[B]`, 0 or 1.
        num_heads: N.
        q_norm: RMSNorm of every query head, with a weight `[H]`; None: there is none.
        k_norm: RMSNorm of every key head; there must be one if there is one for queries.
        implementation: `"mosaic"` is one launch; `"separate"` an op each, as it chooses;
            `"xla"` all in plain JAX; or several in order. None: `"separate"` where somebody forces
            an implementation of one of the ops that it stands for, or gives a tiling, else the
            first of `config.with_projection` that can serve.
        config: Tiling of the product, as for `matmul`; in one launch `block_n` must be H/2, or 64
            if that is H.

    Returns:
        Rotated queries `[B, 1, N, H]`, and both pools with the new tokens.

    Raises:
        ValueError: as `matmul` and `rope_kv_write`; one norm without the other, of another width
            than H, or with a negative `eps`.
        TypeError: as `matmul` and `rope_kv_write`.
        NotSupported: the implementation asked for by name cannot serve the call.

    Numerics: one launch keeps the product in float32 until it is rotated; ops round in between.

    >>> x, weight = jnp.ones((1, 1, 4)), jnp.ones((4, 12))
    >>> one, zero, pages = jnp.ones((1, 1, 2)), jnp.zeros((1, 1, 2)), jnp.zeros((2, 1, 16, 4))
    >>> place = jnp.array([[1]]), jnp.array([3]), jnp.array([1])
    >>> arrays = (x, weight, None, one, zero, pages, pages, *place)
    >>> q, keys, _ = project_rope_write(*arrays, num_heads=1)
    >>> q.shape, int(keys[1, 0, 3].sum()), int(keys.sum())
    ((1, 1, 1, 4), 16, 16)
    """
    check(x, weight, bias, None, False, None)
    check_config(config, Config)
    check_ranks(k_pages=(k_pages, 4), v_pages=(v_pages, 4))
    _, K, _, H = k_pages.shape
    B = x.shape[0]
    if weight.shape[1] != (num_heads + 2 * K) * H:
        raise ValueError(
            f"weight must have (N + 2·K)·H = {(num_heads + 2 * K) * H} columns; got {weight.shape}"
        )
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm must both be given, or neither")
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            check_norm(norm, H, name)
    q, kv = (jax.ShapeDtypeStruct((B, 1, heads, H), x.dtype) for heads in (num_heads, K))
    check_shapes(q, kv, kv, cos, sin, k_pages, v_pages, page_table, start, num_tokens)

    def separate(name: Implementation = None) -> tuple[jax.Array, jax.Array, jax.Array]:
        product = matmul(x, weight, bias, implementation=name, config=config)
        q, k, v = jnp.split(product, [num_heads * H, (num_heads + K) * H], axis=-1)
        q, k, v = (part.reshape(B, 1, -1, H) for part in (q, k, v))
        if q_norm is not None and k_norm is not None:
            q, k = (
                add_rms_norm(part, None, norm.weight, eps=norm.eps, implementation=name)[0]
                for part, norm in ((q, q_norm), (k, k_norm))
            )
        q, _, keys, values = rope_kv_write(
            q, k, v, cos, sin, k_pages, v_pages, page_table, start, num_tokens, implementation=name
        )
        return q, keys, values

    def mosaic() -> tuple[jax.Array, jax.Array, jax.Array]:
        _check_one_launch(heads, tokens=B)
        table, first = page_table.astype(jnp.int32), start.astype(jnp.int32)
        page, slot = places(table, first, num_tokens, T=1, pages=k_pages)
        rotation = Rotation(
            cos=cos[:, 0], sin=sin[:, 0], page=page[:, 0], slot=slot[:, 0], k_pages=k_pages,
            v_pages=v_pages, num_heads=num_heads, q_norm=q_norm, k_norm=k_norm,
        )  # fmt: skip
        if config is not None and config.block_n != heads.bank:
            raise ValueError(
                f"config.block_n must be {heads.bank} for head_dim {H}; got {config.block_n}"
            )
        tiling = configs_of_rope.one_launch_config(current_device(), heads, M=B, D=weight.shape[0])
        choice = configs.Preference(order=("mosaic",), config=tiling)
        queries, (keys, values) = run_mosaic(
            x, weight, bias, None, None, rotation, transposed=False, gate=None, config=config,
            choice=choice,
        )  # fmt: skip
        return queries.reshape(B, 1, num_heads, H), keys, values

    candidates = {
        "mosaic": mosaic, "separate": separate, "xla": functools.partial(separate, "xla"),
    }  # fmt: skip
    # What it stands for here: who forces one of them wants it by itself.
    parts = ["matmul", "rope_kv_write", *["add_rms_norm"] * (q_norm is not None)]
    if implementation is None and (config is not None or any(map(is_forced, parts))):
        implementation = "separate"
    heads = Heads(num_heads, K, H)
    order = configs_of_rope.with_projection(current_device(), heads, M=B, D=weight.shape[0])
    return choose(NAME, implementation, candidates, order)


def _check_one_launch(heads: Heads, *, tokens: int) -> None:
    """Raise NotSupported where one launch cannot serve, whatever the product allows."""
    refuse = functools.partial(NotSupported, NAME, "mosaic")
    device = current_device()
    if not device.is_hopper:
        raise refuse(f"device {device.name!r}", "Hopper GPUs (compute capability 9.0)")
    if heads.H not in HEAD_DIMS:
        known = ", ".join(str(width) for width in HEAD_DIMS)
        raise refuse(f"head_dim {heads.H} with the projection", known)
    if tokens > heads.most_tokens:
        raise refuse(f"{tokens} tokens with their projection", f"1 to {heads.most_tokens}")
