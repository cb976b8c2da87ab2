"""`rope_kv_write`: the public function."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.pallas_kernels.arguments import check_ranks
from jaxinfer.pallas_kernels.device import current_device
from jaxinfer.pallas_kernels.dispatch import Implementation, NotSupported, choose
from jaxinfer.pallas_kernels.rope_kv_write import config as configs
from jaxinfer.pallas_kernels.rope_kv_write.mosaic_sm90 import rope_kv_write_mosaic, rows_per_tile
from jaxinfer.pallas_kernels.rope_kv_write.xla import rope_kv_write_xla

_NAME = "rope_kv_write"


def rope_kv_write(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    cos: Float[Array, "B T half"],
    sin: Float[Array, "B T half"],
    k_pages: Float[Array, "P K p H"],
    v_pages: Float[Array, "P K p H"],
    page_table: Int[Array, "B M"],
    start: Int[Array, "B"],
    num_tokens: Int[Array, "B"],
    *,
    implementation: Implementation = None,
) -> tuple[
    Float[Array, "B T N H"],
    Float[Array, "B T K H"],
    Float[Array, "P K p H"],
    Float[Array, "P K p H"],
]:
    """Rotate queries and keys, and write keys and values into the paged cache.

    RoPE (Su et al., 2021) in the half-split form: pairs are (i, i + H/2). Token t of row b, for
    t < num_tokens[b], lands at sequence position `start[b] + t`: page
    `page_table[b, position // p]`, slot `position % p`. Other tokens are written nowhere, and so
    are those with a position outside the table (below 0, or from M·p on), or with an entry there
    that names no page (below 0, or from P on).

    Args:
        q: `[B, T, N, H]` queries before rotation.
        k: `[B, T, K, H]` keys before rotation.
        v: `[B, T, K, H]` values.
        cos: `[B, T, H/2]` float32, cosines of the angles.
        sin: `[B, T, H/2]` float32.
        k_pages: `[P, K, p, H]`; donate it to the enclosing jit and it is updated in place.
        v_pages: `[P, K, p, H]`.
        page_table: `[B, M]` int32, pages of each row in order.
        start: `[B]` int32, position of token 0.
        num_tokens: `[B]` int32, tokens of each row that are real, 0 … T.
        implementation: `"mosaic"`, `"xla"`, several in order, or None for the measured choice.

    Returns:
        Rotated q and k in their dtype, and both pools with the new tokens.

    Raises:
        ValueError: shapes that do not fit together.
        TypeError: keys, values and pages of different dtypes, tables that are not integers, or
            arguments that are no arrays.
        NotSupported: the implementation asked for by name cannot serve the call.
        ExceptionGroup: several were asked for and none can.

    Numerics: the rotation is computed in float32 and rounded once.

    Memory: in place where the pools are donated; otherwise a copy of both.

    >>> x, pages = jnp.ones((1, 2, 1, 4)), jnp.zeros((2, 1, 16, 4))
    >>> one, zero = jnp.ones((1, 2, 2)), jnp.zeros((1, 2, 2))
    >>> table, start, count = jnp.array([[1]]), jnp.array([3]), jnp.array([2])
    >>> _, _, keys, _ = rope_kv_write(x, x, x, one, zero, pages, pages, table, start, count)
    >>> int(keys[1, 0, 3:5].sum()), int(keys.sum())
    (8, 8)
    """
    check_shapes(q, k, v, cos, sin, k_pages, v_pages, page_table, start, num_tokens)
    arguments = (
        q, k, v, cos, sin, k_pages, v_pages,
        *(table.astype(jnp.int32) for table in (page_table, start, num_tokens)),
    )  # fmt: skip

    def mosaic():
        _check_mosaic(q, k)
        return rope_kv_write_mosaic(*arguments)

    candidates = {"mosaic": mosaic, "xla": functools.partial(rope_kv_write_xla, *arguments)}
    return choose(_NAME, implementation, candidates, configs.PREFERRED)


def _check_mosaic(q, k) -> None:
    """Raise NotSupported where the kernel cannot serve the call."""
    refuse = functools.partial(NotSupported, _NAME, "mosaic")
    device = current_device()
    if not device.is_hopper:
        raise refuse(f"device {device.name!r}", "Hopper GPUs (compute capability 9.0)")
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k.dtype != q.dtype:
        raise refuse(f"dtypes {q.dtype} and {k.dtype}", "bfloat16 or float16 for all")
    N, H = q.shape[2:]
    K = k.shape[2]
    if H not in (64, 128, 256):
        raise refuse(f"head_dim {H}", "64, 128, 256")
    if rows_per_tile(N + K, H) is None:
        raise refuse(f"N + K = {N + K} heads at head_dim {H}", "a multiple of 4 (2 at H = 128)")
    if max(N, K) > 256:
        raise refuse(f"{max(N, K)} heads", "at most 256")
    most = device.smem_bytes // (2 * H)  # one token's q, k and v lie in shared memory
    heads = N + 2 * K
    if heads > most:
        raise refuse(f"N + 2·K = {heads} heads at head_dim {H}", f"at most {most}")


def check_shapes(q, k, v, cos, sin, k_pages, v_pages, page_table, start, num_tokens) -> None:
    """Raise ValueError or TypeError for arguments that no implementation takes."""
    check_ranks(
        q=(q, 4), k=(k, 4), v=(v, 4), cos=(cos, 3), sin=(sin, 3), k_pages=(k_pages, 4),
        v_pages=(v_pages, 4), page_table=(page_table, 2), start=(start, 1),
        num_tokens=(num_tokens, 1),
    )  # fmt: skip
    _check(q, k, v, cos, sin, k_pages, v_pages, page_table, start, num_tokens)


def _check(q, k, v, cos, sin, k_pages, v_pages, page_table, start, num_tokens) -> None:
    B, T, _, H = q.shape
    if H % 2:
        raise ValueError(f"head_dim must be even, to be rotated in pairs; got H={H}")
    if k.shape != v.shape or k.shape[:2] != (B, T) or k.shape[3] != H:
        raise ValueError(
            f"k and v must be [B, T, K, H] like q {q.shape}; got {k.shape} and {v.shape}"
        )
    if cos.shape != (B, T, H // 2) or sin.shape != cos.shape:
        raise ValueError(
            f"cos and sin must be [B, T, H/2] = {(B, T, H // 2)}; got {cos.shape}, {sin.shape}"
        )
    K = k.shape[2]
    if k_pages.shape != v_pages.shape or (k_pages.shape[1], k_pages.shape[3]) != (K, H):
        raise ValueError(f"pages must be [P, {K}, p, {H}]; got {k_pages.shape} and {v_pages.shape}")
    for name, array in (("page_table", page_table), ("start", start), ("num_tokens", num_tokens)):
        if array.shape[0] != B:
            raise ValueError(f"{name} must have B={B} rows; got {array.shape}")
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(f"{name} must be integers; got {array.dtype}")
    if not (k.dtype == v.dtype == k_pages.dtype == v_pages.dtype):
        raise TypeError(
            f"k, v and pages must have one dtype; "
            f"got {k.dtype}, {v.dtype}, {k_pages.dtype}, {v_pages.dtype}"
        )
