"""`attention`: the public function."""

import functools
from typing import Literal, TypedDict, Unpack, overload

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.pallas_kernels.arguments import (
    as_scale,
    as_softcap,
    check_arrays,
    check_dtype,
    check_ranks,
    window_sides,
)
from jaxinfer.pallas_kernels.attention.config import preferred
from jaxinfer.pallas_kernels.attention.cudnn import attention_cudnn
from jaxinfer.pallas_kernels.attention.cudnn_residual import attention_cudnn_residual
from jaxinfer.pallas_kernels.attention.flash_attn3 import attention_flash_attn3
from jaxinfer.pallas_kernels.attention.mask import Visibility
from jaxinfer.pallas_kernels.attention.pages import gather_pages
from jaxinfer.pallas_kernels.attention.tokamax import attention_tokamax
from jaxinfer.pallas_kernels.attention.xla import attention_xla
from jaxinfer.pallas_kernels.debug import checked_pages
from jaxinfer.pallas_kernels.device import current_device
from jaxinfer.pallas_kernels.dispatch import Implementation, choose
from jaxinfer.pallas_kernels.observe import notify

_FAR = 2**30  # No position is so far from another, and int32 has room for a position beside it.


class _Options(TypedDict, total=False):
    """Keyword arguments of `attention`, for type checkers."""

    scale: float | None
    is_causal: bool
    q_offset: Array | int | None
    query_seq_lengths: Array | None
    key_value_seq_lengths: Array | None
    local_window_size: int | tuple[int, int] | None
    logits_softcap: float | None
    page_table: Array | None
    implementation: Implementation


@overload
def attention(
    query: Array, key: Array, value: Array,
    *, return_residual: Literal[False] = False, **options: Unpack[_Options],
) -> Array: ...  # fmt: skip
@overload
def attention(
    query: Array, key: Array, value: Array,
    *, return_residual: Literal[True], **options: Unpack[_Options],
) -> tuple[Array, Array]: ...  # fmt: skip
def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"] | Float[Array, "P K p H"],
    value: Float[Array, "B S K H"] | Float[Array, "P K p H"],
    *,
    scale: float | None = None,
    is_causal: bool = False,
    q_offset: Int[Array, "B"] | int | None = None,
    query_seq_lengths: Int[Array, "B"] | None = None,
    key_value_seq_lengths: Int[Array, "B"] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    logits_softcap: float | None = None,
    page_table: Int[Array, "B M"] | None = None,
    return_residual: bool = False,
    implementation: Implementation = None,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Dense attention with the arguments of `jax.nn.dot_product_attention`, and more.

    Query token t has position `q_offset + t`; key j has position j. Rows past
    `query_seq_lengths`, and rows that see no key, give zeros and lse = -inf.

    Args:
        query: `[B, T, N, H]`; float32, bfloat16 or float16.
        key: `[B, S, K, H]`, K divides N; or pages `[P, K, p, H]` with `page_table`.
        value: As `key`.
        scale: Factor on q·k; default 1/sqrt(H).
        is_causal: Hide keys after the query's position.
        q_offset: Position of query token 0: an int, `[B]` int32, or None for 0.
        query_seq_lengths: `[B]` int32 valid query tokens; None: all T.
        key_value_seq_lengths: `[B]` int32 valid keys; None: all S. With pages, slots and table
            entries past it are not used.
        local_window_size: `(left, right)` keys visible around a query's position; an int stands
            for both sides. With `is_causal`, right is cut at 0.
        logits_softcap: Logits become c·tanh(logits / c).
        page_table: `[B, M]` int32: keys and values are pages; S = M·p.
        return_residual: Also return the log-sum-exp of the logits.
        implementation: `"xla"`, `"cudnn"`, `"flash_attn3"`, `"tokamax"`, several in order, or
            None for the measured choice.

    Returns:
        `[B, T, N, H]` in the query's dtype; with `return_residual` also `[B, T, N]` float32,
        the natural-log log-sum-exp, as `merge_attention` takes it.

    Raises:
        ValueError: shapes or parameters that do not fit together; in debug mode (the environment
            has JAXINFER_DEBUG=1) also lengths and page numbers out of range, where there is a
            `page_table`.
        TypeError: dtypes that differ, integers where floats are needed, a window that is not
            integers, arguments that are no arrays, or a scale or soft cap that is no number.
        NotSupported: the implementation asked for by name cannot serve the call.
        ExceptionGroup: several were asked for and none can.

    Numerics: logits, softmax and accumulation in float32; probabilities are rounded to the
    dtype of the values before they meet them.

    Memory: linear in T and S, except `cudnn` with an offset or a window of two sides, which builds
    a `B·T·S` mask (with a residual it refuses). Pages are copied into `2·B·S·K·H` elements first.

    >>> x = jnp.ones((1, 3, 2, 8))
    >>> attention(x, x, x, is_causal=True).shape
    (1, 3, 2, 8)
    """
    _check(query, key, value, page_table)
    logits_softcap = as_softcap(logits_softcap)
    scale = as_scale(scale, head_dim=query.shape[-1])
    left, right = _window(local_window_size)
    B = query.shape[0]
    starts_at_zero = q_offset is None or (isinstance(q_offset, int) and q_offset == 0)
    if q_offset is None or isinstance(q_offset, int):
        q_offset = jnp.full((B,), q_offset or 0, jnp.int32)
    if page_table is not None:
        page_table, key_value_seq_lengths = checked_pages(
            page_table, key_value_seq_lengths, name="key_value_seq_lengths",
            page_size=key.shape[2], num_pages=key.shape[0],
        )  # fmt: skip
    visibility = Visibility(
        is_causal=is_causal, left=left, right=right,
        q_offset=_per_row("q_offset", q_offset, B),
        query_lengths=_per_row("query_seq_lengths", query_seq_lengths, B),
        key_lengths=_per_row("key_value_seq_lengths", key_value_seq_lengths, B),
    )  # fmt: skip
    if page_table is not None:
        key, value = gather_pages(key, page_table), gather_pages(value, page_table)
    arrays = (query, key, value, visibility)
    options = {"logits_softcap": logits_softcap, "scale": scale}
    notify("attention", query=query, key=key, value=value, visibility=visibility, **options)
    device = current_device()
    extra = {
        "starts_at_zero": starts_at_zero,
        "return_residual": return_residual,
        "device": device,
    }
    candidates = {
        "flash_attn3": functools.partial(attention_flash_attn3, *arrays, **options, **extra),
        "cudnn": functools.partial(attention_cudnn, *arrays, **options, **extra),
        "tokamax": functools.partial(attention_tokamax, *arrays, **options, **extra),
        "xla": functools.partial(attention_xla, *arrays, **options),
    }
    if return_residual:
        del extra["return_residual"]
        candidates["cudnn"] = functools.partial(
            attention_cudnn_residual, *arrays, **options, **extra
        )
    order = preferred(device, head_dim=query.shape[-1])
    out, lse = choose("attention", implementation, candidates, order)
    return (out, lse) if return_residual else out


def _window(window: int | tuple[int, int] | None) -> tuple[int | None, int | None]:
    sides = window_sides(window)
    if sides is None:
        return None, None
    left, right = (side if side < _FAR else None for side in sides)
    return left, right


def _check(query, key, value, page_table) -> None:
    check_ranks(query=(query, 4), key=(key, 4), value=(value, 4))
    if key.shape != value.shape:
        raise ValueError(f"key and value must have one shape; got {key.shape} and {value.shape}")
    if query.shape[3] != key.shape[3]:
        raise ValueError(
            f"head_dim of query and key must agree; got {query.shape[3]} and {key.shape[3]}"
        )
    rows, heads = (key.shape[0], key.shape[2]) if page_table is None else (None, key.shape[1])
    if page_table is None and rows != query.shape[0]:
        raise ValueError(f"query and key must have one batch size; got {query.shape[0]} and {rows}")
    if query.shape[2] % heads:
        raise ValueError(
            f"query heads must be a multiple of KV heads; got N={query.shape[2]} and K={heads}"
        )
    if page_table is not None:
        check_arrays(page_table=page_table)
        if page_table.ndim != 2 or page_table.shape[0] != query.shape[0]:
            raise ValueError(
                f"page_table must be [B, M] with B={query.shape[0]}; got {page_table.shape}"
            )
        if not jnp.issubdtype(page_table.dtype, jnp.integer):
            raise TypeError(f"page_table must be integers; got {page_table.dtype}")
        if page_table.shape[1] == 0:
            raise ValueError("page_table must name at least one page per row; got M=0")
    if not (query.dtype == key.dtype == value.dtype):
        raise TypeError(
            f"query, key and value must have one dtype; "
            f"got {query.dtype}, {key.dtype}, {value.dtype}"
        )
    check_dtype("query", query)


@overload
def _per_row(name: str, values: Array, B: int) -> Array: ...
@overload
def _per_row(name: str, values: Array | None, B: int) -> Array | None: ...
def _per_row(name: str, values: Array | None, B: int) -> Array | None:
    """An argument with one integer per row, as int32."""
    if values is None:
        return None
    check_arrays(**{name: values})
    if jnp.shape(values) != (B,):
        raise ValueError(f"{name} must have shape [B] with B={B}; got {jnp.shape(values)}")
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers; got {values.dtype}")
    return values.astype(jnp.int32)
