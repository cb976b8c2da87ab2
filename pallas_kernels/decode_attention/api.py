"""`decode_attention`: the public function."""

import functools
from typing import Any, Literal, TypedDict, Unpack, get_args, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Integer

from jaxinfer.pallas_kernels.arguments import (
    as_scale,
    as_softcap,
    check_arrays,
    check_config,
    check_dtype,
    check_ranks,
    window_sides,
)
from jaxinfer.pallas_kernels.debug import checked_pages
from jaxinfer.pallas_kernels.decode_attention import config as configs
from jaxinfer.pallas_kernels.decode_attention.layout import KVLayout, cut, sizes
from jaxinfer.pallas_kernels.decode_attention.mosaic_sm90 import decode_attention_mosaic
from jaxinfer.pallas_kernels.decode_attention.shape import Config, tile_rows
from jaxinfer.pallas_kernels.decode_attention.xla import decode_attention_xla
from jaxinfer.pallas_kernels.device import DeviceSpec, current_device
from jaxinfer.pallas_kernels.dispatch import Implementation, NotSupported, choose
from jaxinfer.pallas_kernels.observe import notify

MAX_TOKENS = 8
_NAME = "decode_attention"
Softmax = Literal["auto", "online", "unified"]


class _Options(TypedDict, total=False):
    """Keyword arguments of `decode_attention`, for type checkers."""

    scale: float | None
    local_window_size: int | tuple[int, int] | None
    logits_softcap: float | None
    softmax: Softmax
    phi: Array | None
    kv_layout: KVLayout
    counters: jax.Ref | None
    implementation: Implementation
    config: Config | None


@overload
def decode_attention(
    query: Array, k_pages: Array, v_pages: Array, page_table: Array | None, lengths: Array,
    *, return_residual: Literal[False] = False, return_fallbacks: Literal[False] = False,
    **options: Unpack[_Options],
) -> Array: ...  # fmt: skip
@overload
def decode_attention(
    query: Array, k_pages: Array, v_pages: Array, page_table: Array | None, lengths: Array,
    *, return_residual: Literal[True], return_fallbacks: bool = False,
    **options: Unpack[_Options],
) -> tuple[Array, ...]: ...  # fmt: skip
@overload
def decode_attention(
    query: Array, k_pages: Array, v_pages: Array, page_table: Array | None, lengths: Array,
    *, return_residual: bool = False, return_fallbacks: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Array, ...]: ...  # fmt: skip
def decode_attention(
    query: Float[Array, "B T N H"],
    k_pages: Float[Array, "_ _ _ H"],
    v_pages: Float[Array, "_ _ _ H"],
    page_table: Integer[Array, "B M"] | None,
    lengths: Integer[Array, "B"],
    *,
    scale: float | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    logits_softcap: float | None = None,
    softmax: Softmax = "auto",
    phi: Float[Array, "N"] | None = None,
    kv_layout: KVLayout = "PKpH",
    return_residual: bool = False,
    return_fallbacks: bool = False,
    counters: jax.Ref | None = None,
    implementation: Implementation = None,
    config: Config | None = None,
) -> Array | tuple[Array, ...]:
    """Attend from the last few tokens of every request to its paged keys and values.

    Query token t of row b sits at position `lengths[b] - T + t` and sees the keys up to its own
    position. A row of length 0 gives zeros and lse = -inf. Lengths may change from call to call
    without recompilation.

    Args:
        query: `[B, T, N, H]`, T = 1 … 8; float32, bfloat16 or float16.
        k_pages: `[P, K, p, H]`, K divides N; the query's dtype. Or another order of axes, see
            `kv_layout`; or, without `page_table`, contiguous keys `[B, S, K, H]`.
        v_pages: As `k_pages`.
        page_table: `[B, M]` int32, pages of each row in order. Entries that `lengths` does not
            reach are never read; those it does reach must be below P. None: keys and values are
            contiguous.
        lengths: `[B]` int32, 0 … M·p keys per row, the T query tokens included.
        scale: Factor on q·k; default 1/sqrt(H).
        local_window_size: Keys visible before a query's position (an int or `(left, right)`, as
            in `jax.nn.dot_product_attention`; nothing lies to the right of the newest tokens). One
            of M·p or more hides nothing.
        logits_softcap: Logits become c·tanh(logits / c).
        softmax: `"online"` rescales as larger logits come by. `"unified"` keeps one reference φ,
            so that no block of keys waits for a maximum; where that leaves the safe range, the keys
            concerned are computed once more with the online softmax within the same call. `"auto"`
            is unified where `phi` is given, else online. `xla` is always online.
        phi: `[N]` float32, φ of every query head for `"unified"`: near the largest logit that the
            head is expected to see (scale and soft cap included, natural). None: the largest logit
            of the first block of keys that a group of CTAs sees, which needs no calibration.
        kv_layout: Order of the axes of pages: `"PKpH"`, `"PpKH"` or `"KPpH"`.
        return_residual: Also return the log-sum-exp of the logits.
        return_fallbacks: Also return how often the unified softmax had to fall back: pieces of
            a KV head's keys that were computed again, an int32 scalar; 0 where it was not run.
        counters: A reference (`jax.new_ref`) to `[B·K]` int32 zeros, which are zeros again when
            the call is over. CTAs count in them which of a request's keys are done. Calls that
            follow each other, such as those of the layers of a step, may share one: each call
            without takes a launch more to set its own to zero.
        implementation: `"mosaic"`, `"xla"`, several in order, or None for the measured choice.
        config: Tiling of the Mosaic kernel; default: measured, else by heuristic.

    Returns:
        `[B, T, N, H]` in the query's dtype; with `return_residual` also `[B, T, N]` float32, the
        natural-log log-sum-exp, so that `merge_attention` can combine partial results; with
        `return_fallbacks` last an int32 scalar.

    Raises:
        ValueError: shapes or parameters that do not fit together; in debug mode (the environment
            has JAXINFER_DEBUG=1) also lengths and page numbers out of range.
        TypeError: dtypes that differ, integers where floats are needed, a window that is not
            integers, `phi` that is not numbers, counters that are no reference, arguments that are
            no arrays, a scale or soft cap that is no number, or a config of another class.
        NotSupported: the implementation asked for by name cannot serve the call.
        ExceptionGroup: several were asked for and none can.

    Numerics: logits, softmax and accumulation in float32; probabilities are rounded to the
    query's dtype before they meet V (relative RMS error about 2e-3 in bfloat16). For finite inputs
    the result holds no NaN or Inf, whatever `phi`, as long as values stay below 2^100.

    Memory: `mosaic` reads each visible key and value once and writes partial results of
    4·H·(CTAs + B·K)·R' bytes, R' = T·N/K rounded up to a multiple of 8. `xla` copies all pages that
    `page_table` names.

    Follows FlashDecoding (split-KV with a log-sum-exp merge) and section 3 of FlashDecoding++
    (arXiv 2311.01282), with a reference for every piece instead of one for all, which the merge
    allows.

    >>> pages = jnp.ones((4, 1, 16, 8))
    >>> table, lengths = jnp.array([[2, 0]]), jnp.array([20])
    >>> decode_attention(jnp.ones((1, 1, 2, 8)), pages, pages, table, lengths).shape
    (1, 1, 2, 8)
    """
    check_config(config, Config)
    if kv_layout not in get_args(KVLayout):
        raise ValueError(f"kv_layout must be one of {get_args(KVLayout)}; got {kv_layout!r}")
    if page_table is None:
        _check_contiguous(query, k_pages, v_pages)
        k_pages, page_table = cut(k_pages)
        v_pages, _ = cut(v_pages)
        kv_layout = "PpKH"
    _check(query, k_pages, v_pages, page_table, lengths, kv_layout)
    num_pages, K, page_size = sizes(k_pages.shape, kv_layout)
    page_table, reached = checked_pages(
        page_table, lengths, name="lengths", page_size=page_size, num_pages=num_pages
    )
    lengths = lengths if reached is None else reached
    # Positions are differences of lengths: those of a narrow or unsigned type would wrap.
    page_table, lengths = page_table.astype(jnp.int32), lengths.astype(jnp.int32)
    left_window = _left_window(local_window_size, capacity=page_table.shape[1] * page_size)
    logits_softcap = as_softcap(logits_softcap)
    scale = as_scale(scale, head_dim=query.shape[-1])
    phi = _as_phi(phi, query.shape[2])
    unified = _is_unified(softmax, phi)
    if counters is not None:
        _check_counters(counters, query.shape[0] * K)
    call = functools.partial(
        _dispatch, query, k_pages, v_pages, page_table, lengths, counters=counters,
        scale=scale, left_window=left_window, logits_softcap=logits_softcap,
        kv_layout=kv_layout, unified=unified, phi=phi if unified else None,
    )  # fmt: skip
    out, lse, fallbacks = call(implementation=implementation, config=config)
    if unified and fallbacks is not None:
        notify(_NAME, fallbacks=fallbacks)
    fallbacks = jnp.int32(0) if fallbacks is None else fallbacks
    results = [out, *[lse] * return_residual, *[fallbacks] * return_fallbacks]
    return tuple(results) if len(results) > 1 else out


def _dispatch(
    query, k_pages, v_pages, page_table, lengths,
    *, unified, phi, counters, implementation, config, **options,
):  # fmt: skip
    device = current_device()
    arrays = (query, k_pages, v_pages, page_table, lengths)
    B, T, N, H = query.shape
    _, K, page_size = sizes(k_pages.shape, options["kv_layout"])
    choice = configs.choose_config(
        device, B=B, S=page_table.shape[1] * page_size, T=T, N=N, K=K, H=H, page_size=page_size,
        left_window=options["left_window"],
        as_measured=options["kv_layout"] == "PKpH" and not unified,
    )  # fmt: skip

    def mosaic():
        _check_mosaic(device, query, K, page_size)
        rows = tile_rows(T * N // K)
        chosen = config or choice.config
        if chosen is None:
            chosen = configs.heuristic_config(device, rows=rows, head_dim=H)
        configs.check_fits(chosen, device, rows=rows, head_dim=H)
        *found, counted = decode_attention_mosaic(
            *arrays, **options, unified=unified, phi=phi, config=chosen, num_sms=device.num_sms,
            counters=None if counters is None else counters[...],
        )  # fmt: skip
        if counters is not None:
            counters[...] = counted
        return tuple(found)

    def xla():
        return *decode_attention_xla(*arrays, **options), None  # online whatever was asked for

    candidates = {"mosaic": mosaic, "xla": xla}
    return choose(_NAME, implementation, candidates, choice.order)


def _check_mosaic(device: DeviceSpec, query, K: int, page_size: int) -> None:
    """Raise NotSupported where the kernel cannot serve the call."""
    refuse = functools.partial(NotSupported, _NAME, "mosaic")
    if not device.is_hopper:
        raise refuse(f"device {device.name!r}", "Hopper GPUs (compute capability 9.0)")
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        raise refuse(f"dtype {query.dtype}", "bfloat16, float16")
    if query.shape[3] not in configs.HEAD_DIMS:
        raise refuse(f"head_dim {query.shape[3]}", ", ".join(map(str, configs.HEAD_DIMS)))
    if page_size not in configs.PAGE_SIZES:
        raise refuse(f"page_size {page_size}", ", ".join(map(str, configs.PAGE_SIZES)))
    rows = query.shape[1] * query.shape[2] // K
    if rows > configs.MAX_ROWS:
        raise refuse(f"{rows} query rows (T·N/K) per KV head", f"at most {configs.MAX_ROWS}")


def _check_counters(counters, size: int) -> None:
    if not isinstance(counters, jax.Ref):
        raise TypeError(
            f"counters must be a reference (jax.new_ref of zeros); got {type(counters).__name__}"
        )
    if counters.shape != (size,) or counters.dtype != jnp.int32:
        raise ValueError(
            f"counters must be a reference to [{size}] int32, one per request and KV head; "
            f"got {counters.shape} {counters.dtype}"
        )


def _check_contiguous(query, key, value) -> None:
    check_arrays(query=query, k_pages=key, v_pages=value)
    for name, array in (("k_pages", key), ("v_pages", value)):
        if array.ndim != 4:
            raise ValueError(
                f"{name} must be [B, S, K, H] where there is no page_table; got shape {array.shape}"
            )
    if key.shape != value.shape:
        raise ValueError(
            f"k_pages and v_pages must have one shape; got {key.shape} and {value.shape}"
        )
    if query.ndim == 4 and key.shape[0] != query.shape[0]:
        raise ValueError(
            f"query and k_pages must have one row per request; got {query.shape} and {key.shape}"
        )
    if key.size == 0:
        raise ValueError(f"k_pages must not be empty; got shape {key.shape}")


def _check(query, k_pages, v_pages, page_table, lengths, layout: KVLayout) -> None:
    check_ranks(
        query=(query, 4), k_pages=(k_pages, 4), v_pages=(v_pages, 4), page_table=(page_table, 2),
        lengths=(lengths, 1),
    )  # fmt: skip
    B, T, N, H = query.shape
    if k_pages.shape != v_pages.shape:
        raise ValueError(
            f"k_pages and v_pages must have one shape; got {k_pages.shape} and {v_pages.shape}"
        )
    if not 1 <= T <= MAX_TOKENS:
        raise ValueError(
            f"decode_attention takes 1 to {MAX_TOKENS} query tokens (use attention for more); "
            f"got T={T}"
        )
    if k_pages.shape[3] != H:
        raise ValueError(f"head_dim of query and pages must agree; got {H} and {k_pages.shape[3]}")
    _, K, _ = sizes(k_pages.shape, layout)
    if N % K:
        raise ValueError(f"query heads must be a multiple of KV heads; got N={N} and K={K}")
    if page_table.shape[0] != B or lengths.shape[0] != B:
        raise ValueError(
            f"page_table and lengths must have one row per request (B={B}); "
            f"got {page_table.shape} and {lengths.shape}"
        )
    for name, array in (("page_table", page_table), ("lengths", lengths)):
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(f"{name} must be integers; got {array.dtype}")
    if not (query.dtype == k_pages.dtype == v_pages.dtype):
        raise TypeError(
            f"query, k_pages and v_pages must have one dtype; "
            f"got {query.dtype}, {k_pages.dtype}, {v_pages.dtype}"
        )
    check_dtype("query", query)


def _left_window(window: int | tuple[int, int] | None, *, capacity: int) -> int | None:
    """Keys visible before a query's position; None: all that a row has room for."""
    sides = window_sides(window)
    return None if sides is None or sides[0] >= capacity else sides[0]


def _as_phi(phi: Array | None, num_heads: int) -> Array | None:
    """`phi` as an array, which has one number per query head, finite in float32."""
    if phi is None:
        return None
    if np.iscomplexobj(phi):  # traced or not
        kind = getattr(phi, "dtype", type(phi).__name__)
        raise TypeError(f"phi must be an array of real numbers; got {kind}")
    numbers = phi if isinstance(phi, Tracer) else _numbers(phi)
    if numbers.shape != (num_heads,):
        raise ValueError(
            f"phi must have one number per query head ({num_heads}); got {numbers.shape}"
        )
    if isinstance(numbers, np.ndarray) and not np.isfinite(numbers).all():
        raise ValueError("phi must be finite in float32")
    return phi if isinstance(phi, jax.Array) else jnp.asarray(numbers)


def _numbers(phi: Any) -> np.ndarray:
    try:
        with np.errstate(over="ignore"):  # what float32 has no room for becomes infinite
            return np.asarray(phi, np.float32)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"phi must be an array of real numbers; got {type(phi).__name__}"
        ) from error


def _is_unified(softmax: str, phi: Array | None) -> bool:
    if softmax not in get_args(Softmax):
        raise ValueError(f"softmax must be one of {get_args(Softmax)}; got {softmax!r}")
    if phi is not None and softmax == "online":
        raise ValueError(
            "phi is for the unified softmax; leave it out or ask for softmax='unified'"
        )
    return softmax == "unified" or phi is not None
