"""Decode attention for Hopper: split-KV over all SMs, tokens in the short side of wgmma.

Both products are transposed so that the keys (and then the head dimension) fill wgmma's 64 rows,
and the few query rows of a KV head sit in its short side, padded to 8 instead of 64:

    Sᵀ [block, R] = K [block, H] · Qᵀ [H, R]        Oᵀ [H, R] += Vᵀ [H, block] · Pᵀ [block, R]

Work division: `plan.py`. The kernel: `attend_sm90.py`. Merging: `merge_sm90.py`.
"""

import functools

import jax
import jax.numpy as jnp

from jaxinfer.pallas_kernels import plgpu
from jaxinfer.pallas_kernels.decode_attention.attend_sm90 import attend
from jaxinfer.pallas_kernels.decode_attention.layout import KVLayout, sizes
from jaxinfer.pallas_kernels.decode_attention.merge_sm90 import merge_pieces
from jaxinfer.pallas_kernels.decode_attention.plan import num_groups
from jaxinfer.pallas_kernels.decode_attention.shape import Config, Shape
from jaxinfer.pallas_kernels.decode_attention.softmax_sm90 import LOG2E


# Layers that call alike share one trace and one lowering.
@functools.partial(
    jax.jit,
    static_argnames=(
        "scale",
        "left_window",
        "logits_softcap",
        "unified",
        "kv_layout",
        "config",
        "num_sms",
    ),
)
def decode_attention_mosaic(
    query: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    left_window: int | None = None,
    logits_softcap: float | None = None,
    unified: bool = False,
    phi: jax.Array | None = None,
    counters: jax.Array | None = None,
    kv_layout: KVLayout = "PKpH",
    config: Config,
    num_sms: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Attend with the Hopper kernel; shapes and meaning as in `api.decode_attention`.

    Returns:
        Output `[B, T, N, H]` in the query's dtype, log-sum-exp `[B, T, N]` float32, the number of
        pieces that were computed again, int32, and counters as they were given, if they were.
    """
    B, T, N, H = query.shape
    _, K, page_size = sizes(k_pages.shape, kv_layout)
    softmax = "online" if not unified else "unified" if phi is None else "unified by phi"
    shape = Shape(
        B=B, T=T, K=K, G=N // K, H=H, page_size=page_size, kv_layout=kv_layout, config=config,
        groups=num_groups(num_ctas=num_sms * config.ctas_per_sm, num_kv_heads=K),
        scale=scale, left_window=left_window, softcap=logits_softcap, softmax=softmax,
        capacity=page_table.shape[1] * page_size, interpreted=plgpu.interpreting(),
    )  # fmt: skip
    # Rows of one KV head side by side: [B·K, R, H] (free for T = 1).
    rows = query.reshape(B, T, K, shape.G, H).transpose(0, 2, 1, 3, 4).reshape(B * K, -1, H)
    rows = jnp.pad(rows, ((0, 0), (0, shape.held_rows - shape.R), (0, 0)))
    arrays = (rows, k_pages, v_pages, page_table, lengths, _phi_of_rows(shape, phi))
    if shape.second_pass:
        *found, again = attend(shape, *arrays, None)
        out, lse = merge_pieces(shape, lengths, *found)
    else:
        counting = jax.new_ref(jnp.zeros((B * K,), jnp.int32) if counters is None else counters)
        out, lse, *_, again = attend(shape, *arrays, counting)
        counters = jax.freeze(counting)
    out = out.reshape(B, K, T, shape.G, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)
    lse = lse[:, : shape.R].reshape(B, K, T, shape.G).transpose(0, 2, 1, 3).reshape(B, T, N)
    return out, lse, jnp.sum(again, dtype=jnp.int32) if unified else jnp.int32(0), counters


def _phi_of_rows(shape: Shape, phi: jax.Array | None) -> jax.Array:
    """`[B·K, rows]` float32 reference of every query row, in base 2; `[1, 1]` if there is none."""
    if phi is None:
        return jnp.zeros((1, 1), jnp.float32)
    of_heads = phi.astype(jnp.float32).reshape(shape.K, 1, shape.G) * LOG2E
    rows = jnp.broadcast_to(of_heads, (shape.K, shape.T, shape.G)).reshape(shape.K, shape.R)
    rows = jnp.pad(rows, ((0, 0), (0, shape.rows - shape.R)))
    return jnp.broadcast_to(rows, (shape.B, *rows.shape)).reshape(-1, shape.rows)
