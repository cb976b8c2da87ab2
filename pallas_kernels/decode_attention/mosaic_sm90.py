"""Decode attention for Hopper: split-KV over all SMs, tokens in the short side of wgmma.

Both products are transposed so that the keys (and then the head dimension) fill wgmma's 64 rows,
and the few query rows of a KV head sit in its short side, padded to 8 instead of 64:

    Sᵀ [block, R] = K [block, H] · Qᵀ [H, R]        Oᵀ [H, R] += Vᵀ [H, block] · Pᵀ [block, R]

One warpgroup issues TMA copies of pages into a ring, one computes. Work division: `plan.py`.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.pallas_kernels import plgpu
from jaxinfer.pallas_kernels.decode_attention.plan import Division, num_groups
from jaxinfer.pallas_kernels.plgpu import pl

LOG2E = math.log2(math.e)
_MERGE_COLUMNS = 64  # of the head dimension, per CTA of the merge
_MERGE_GROUP = 4  # pieces whose loads are in flight together
# Layout inference of the newer semantics finds no layout for the transposed stores used here.
_COMPILER = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Tiling of the kernel.

    Attributes:
        block: Keys per unit of work and per stage of the ring: 64 or 128.
        stages: Depth of the ring.
        ctas_per_sm: Resident CTAs per SM; more hide latency, fewer divide the work more evenly.
    """

    block: int = 64
    stages: int = 4
    ctas_per_sm: int = 1

    def __post_init__(self) -> None:
        if self.block not in (64, 128):
            raise ValueError(f"block must be 64 or 128; got {self.block}")
        if self.stages < 2:
            raise ValueError(f"stages must be at least 2; got {self.stages}")
        if self.ctas_per_sm < 1:
            raise ValueError(f"ctas_per_sm must be positive; got {self.ctas_per_sm}")

    def smem_bytes(self, *, rows: int, head_dim: int) -> int:
        """Shared memory of one CTA, bytes (16-bit elements), barriers and scratch included."""
        stage = 2 * self.block * head_dim + rows * head_dim
        return 2 * (self.stages * stage + rows * self.block) + 4096


def tile_rows(*, segments: int, R: int) -> int:
    """Query rows of a tile.

    Args:
        segments: B·K, KV heads of all requests.
        R: Query rows of each.
    """
    if _can_cut(segments, R):
        return 8 if 8 % R == 0 else 16
    return -(-R // 8) * 8


def _can_cut(segments: int, R: int) -> bool:
    """Whether tiles can be cut from rows that are not padded.

    Tiles begin at multiples of 8. One of 8 rows, or of 16, then holds a whole head's rows and some
    of others': those are computed and dropped, which costs nothing, while padding would cost a
    launch.
    """
    total = segments * R
    return R < 8 and total % 8 == 0 and (8 % R == 0 or total >= 16)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Shape:
    """Static sizes; R query rows (t, g) share a KV head, padded to `rows` (a multiple of 8)."""

    B: int
    T: int
    K: int
    G: int
    H: int
    page_size: int
    config: Config
    groups: int
    scale: float
    left_window: int | None
    softcap: float | None

    @property
    def R(self) -> int:
        return self.T * self.G

    @property
    def division(self) -> Division:
        return Division(
            B=self.B, T=self.T, block=self.config.block, groups=self.groups,
            left_window=self.left_window,
        )  # fmt: skip

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return tile_rows(segments=self.B * self.K, R=self.R)

    @property
    def stride(self) -> int:
        """Rows from one KV head's to the next's: R where tiles can be cut so, else padded."""
        return self.R if _can_cut(self.B * self.K, self.R) else self.rows

    def tile_of(self, segment):
        """First query row of the tile that holds a segment's rows, and where in it they begin.

        Args:
            segment: Number of a request and KV head, `request·K + head`.
        """
        row = segment * self.stride
        last = self.B * self.K * self.stride - self.rows
        start = row - row % 8
        start = min(start, last) if isinstance(start, int) else lax.min(start, jnp.int32(last))
        return start, row - start


# Layers that call alike share one trace and one lowering.
@functools.partial(
    jax.jit, static_argnames=("scale", "left_window", "logits_softcap", "config", "num_sms")
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
    config: Config,
    num_sms: int,
) -> tuple[jax.Array, jax.Array]:
    """Attend with the Hopper kernel; shapes and meaning as in `api.decode_attention`.

    Returns:
        Output `[B, T, N, H]` in the query's dtype and log-sum-exp `[B, T, N]` float32.
    """
    B, T, N, H = query.shape
    K, page_size = k_pages.shape[1:3]
    shape = _Shape(
        B=B, T=T, K=K, G=N // K, H=H, page_size=page_size, config=config,
        groups=num_groups(num_ctas=num_sms * config.ctas_per_sm, num_kv_heads=K),
        scale=scale, left_window=left_window, softcap=logits_softcap,
    )  # fmt: skip
    lengths = lengths.astype(jnp.int32)
    # Rows of one KV head side by side: [B·K, R, H] (free for T = 1).
    rows = query.reshape(B, T, K, shape.G, H).transpose(0, 2, 1, 3, 4).reshape(B * K, -1, H)
    rows = jnp.pad(rows, ((0, 0), (0, shape.stride - shape.R), (0, 0))).reshape(-1, H)
    pieces = _attend(shape, rows, k_pages, v_pages, page_table, lengths)
    out, lse = _merge(shape, query.dtype, lengths, *pieces)
    out = out.reshape(B, K, T, shape.G, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)
    within = np.asarray([shape.tile_of(segment)[1] for segment in range(B * K)])
    lse = lse[np.arange(B * K)[:, None], within[:, None] + np.arange(shape.R)]
    lse = lse.reshape(B, K, T, shape.G).transpose(0, 2, 1, 3).reshape(B, T, N)
    return out, lse


def _attend(shape: _Shape, rows, k_pages, v_pages, page_table, lengths):
    """Every piece: normalised output `[pieces, H, rows]`, base-2 lse `[pieces, rows]`.

    And what the merge finds them by: `[B + 1]`, the number of each request's first unit, and last
    the units of a group. Requests without units have no entry.
    """
    config = shape.config
    dtype = rows.dtype
    pieces = shape.K * shape.division.pieces
    copies = max(1, config.block // shape.page_size)
    tiling = plgpu.TilingTransform((8, 64))
    tiled = (tiling, plgpu.SwizzleTransform(128))
    kv_scratch = plgpu.SMEM((config.stages, config.block, shape.H), dtype, transforms=tiled)
    scratch = dict(
        q_smem=plgpu.SMEM((config.stages, shape.rows, shape.H), dtype, transforms=tiled),
        k_smem=kv_scratch,
        v_smem=kv_scratch,
        p_smem=plgpu.SMEM((shape.rows, config.block), dtype, transforms=tiled),
        k_ready=plgpu.Barrier(num_arrivals=copies + 1, num_barriers=config.stages),
        v_ready=plgpu.Barrier(num_arrivals=copies, num_barriers=config.stages),
        k_free=plgpu.Barrier(num_barriers=config.stages),
        v_free=plgpu.Barrier(num_barriers=config.stages),
    )
    kernel = plgpu.kernel(
        functools.partial(_attend_body, shape),
        out_type=(
            jax.ShapeDtypeStruct((pieces, shape.H, shape.rows), jnp.float32),
            jax.ShapeDtypeStruct((pieces, shape.rows), jnp.float32),
            jax.ShapeDtypeStruct((shape.B + 1,), jnp.int32),
        ),
        scratch_types=scratch,
        grid=(shape.groups * shape.K,),
        grid_names=("cta",),
        kernel_name="decode_attention",
        num_threads=2,
        thread_name="role",
        compiler_params=_COMPILER,
    )
    return kernel(rows, k_pages, v_pages, page_table, lengths)


def _attend_body(
    shape: _Shape,
    q_gmem, k_gmem, v_gmem, table_gmem, lengths_gmem, out_gmem, lse_gmem, firsts_gmem,
    *, q_smem, k_smem, v_smem, p_smem, k_ready, v_ready, k_free, v_free,
):  # fmt: skip
    cta = lax.axis_index("cta")
    role = lax.axis_index("role")
    group, head = lax.div(cta, jnp.int32(shape.K)), lax.rem(cta, jnp.int32(shape.K))
    stages = jnp.int32(shape.config.stages)
    division = shape.division
    start = division.start(lengths_gmem, group)
    unit, units = (start.request, start.block), start.units

    @pl.when(role == 0)
    def _load():
        plgpu.set_max_registers(40, action="decrease")

        def load_unit(i, unit):
            request, block = unit
            slot = lax.rem(i, stages)

            @pl.when(i >= stages)
            def _():
                plgpu.barrier_wait(k_free.at[slot])

            row, _ = shape.tile_of(request * shape.K + head)
            plgpu.copy_gmem_to_smem(
                q_gmem.at[pl.ds(row, shape.rows)], q_smem.at[slot], k_ready.at[slot]
            )
            length = lengths_gmem[request]
            pages = _pages_of(shape, table_gmem, length, request, block)
            valid = length - block * shape.config.block
            _copy_pages(shape, k_gmem, k_smem.at[slot], k_ready.at[slot], head, pages, valid)

            @pl.when(i >= stages)
            def _():
                plgpu.barrier_wait(v_free.at[slot])

            _copy_pages(shape, v_gmem, v_smem.at[slot], v_ready.at[slot], head, pages, valid)

            @pl.when((head == 0) & (block == division.blocks(length)[0]))
            def _note_first():
                firsts_gmem[request] = start.unit + i

            return division.following(lengths_gmem, request, block)

        @pl.when(cta == 0)
        def _note_share():
            firsts_gmem[shape.B] = start.share

        lax.fori_loop(0, units, load_unit, unit)

        # Every completed phase of a barrier must have been observed when the kernel ends.
        @pl.loop(lax.max(units - stages, jnp.int32(0)), units)
        def _drain(i):
            slot = lax.rem(i, stages)
            plgpu.barrier_wait(k_free.at[slot])
            plgpu.barrier_wait(v_free.at[slot])

    @pl.when(role == 1)
    def _compute():
        plgpu.set_max_registers(208, action="increase")
        columns = plgpu.Layout.WGMMA.reduce(0)
        acc = plgpu.layout_cast(jnp.zeros((shape.H, shape.rows), jnp.float32), plgpu.Layout.WGMMA)
        partial_sum = plgpu.layout_cast(
            jnp.zeros((shape.config.block, shape.rows), jnp.float32), plgpu.Layout.WGMMA
        )
        peak = plgpu.layout_cast(jnp.full((shape.rows,), -jnp.inf, jnp.float32), columns)

        def attend_unit(i, carry):
            unit, acc, peak, partial_sum = carry
            request, block = unit
            slot = lax.rem(i, stages)
            plgpu.barrier_wait(k_ready.at[slot])

            def scores(ref):
                plgpu.wgmma(ref, k_smem.at[slot], q_smem.at[slot].transpose((1, 0)))
                return ref[...]

            logits = pl.run_scoped(scores, plgpu.ACC((shape.config.block, shape.rows), jnp.float32))
            plgpu.barrier_arrive(k_free.at[slot])

            length = lengths_gmem[request]
            within = shape.tile_of(request * shape.K + head)[1]
            logits = _mask(shape, _scaled(shape, logits), block, length, within)
            new_peak = jnp.maximum(peak, logits.max(axis=0))
            # A column that has seen no key yet keeps -inf; subtract 0 from it instead.
            safe = jnp.where(new_peak == -jnp.inf, 0.0, new_peak)
            weights = jnp.exp2(logits - lax.broadcast_in_dim(safe, logits.shape, [1]))
            correction = jnp.exp2(peak - safe)
            partial_sum = (
                partial_sum * lax.broadcast_in_dim(correction, partial_sum.shape, [1]) + weights
            )
            acc = acc * lax.broadcast_in_dim(correction, acc.shape, [1])

            p_smem.T[...] = plgpu.layout_cast(
                weights.astype(p_smem.dtype), plgpu.Layout.WGMMA_TRANSPOSED
            )
            plgpu.commit_smem()
            plgpu.barrier_wait(v_ready.at[slot])
            valid = length - block * shape.config.block
            pl.when(valid < shape.config.block)(
                functools.partial(_zero_values, v_smem.at[slot], valid)
            )
            acc = plgpu.wgmma_add(acc, v_smem.at[slot].transpose((1, 0)), p_smem.transpose((1, 0)))
            plgpu.barrier_arrive(v_free.at[slot])

            following = division.following(lengths_gmem, request, block)
            last = (following[0] != request) | (following[1] != block + 1) | (i + 1 >= units)

            @pl.when(last)
            def _():
                total = partial_sum.sum(axis=0)
                seen = total > 0.0
                divisor = jnp.where(seen, total, 1.0)
                piece = head * division.pieces + group + request
                out_gmem[piece] = acc / lax.broadcast_in_dim(divisor, acc.shape, [1])
                lse_gmem[piece] = jnp.where(seen, new_peak + jnp.log2(divisor), -jnp.inf)

            # A new segment starts from nothing.
            keep = jnp.where(last, 0.0, 1.0).astype(jnp.float32)
            acc = acc * keep
            partial_sum = partial_sum * keep
            peak = new_peak + jnp.where(last, -jnp.inf, 0.0).astype(jnp.float32)
            return following, acc, peak, partial_sum

        lax.fori_loop(0, units, attend_unit, (unit, acc, peak, partial_sum))


def _pages_of(shape: _Shape, table, length, request, block):
    """Page number and first slot of every page-sized part of a block of keys."""
    block_keys = shape.config.block
    if shape.page_size >= block_keys:
        per_page = shape.page_size // block_keys
        page = table[request, lax.div(block, jnp.int32(per_page))]
        return [(page, lax.rem(block, jnp.int32(per_page)) * block_keys)]
    # Entries past the row's length may hold anything: name its last page again instead.
    per_block = block_keys // shape.page_size
    last = lax.div(length - 1, jnp.int32(shape.page_size))
    return [(table[request, lax.min(block * per_block + j, last)], 0) for j in range(per_block)]


def _copy_pages(shape: _Shape, pages_gmem, tile_smem, ready, head, pages, valid) -> None:
    """Copy a block of keys or values, of which the first `valid` are wanted.

    At the end of a request only the wanted part is copied, rounded up to a power of two: reading
    whole blocks there would cost 3 % of the traffic at a thousand tokens. The rest of the tile
    holds anything: logits there are masked, values are zeroed before use.
    """
    part = min(shape.page_size, shape.config.block)
    sizes = [size for size in (16, 32, 64) if size < part] + [part]
    for j, (page, slot) in enumerate(pages):
        wanted = valid - j * part

        def copy(size, page=page, slot=slot, j=j):
            source = pages_gmem.at[page, head, pl.ds(slot, size)]
            plgpu.copy_gmem_to_smem(source, tile_smem.at[pl.ds(j * part, size)], ready)

        pl.when(wanted <= 0)(functools.partial(plgpu.barrier_arrive, ready))
        for below, size in zip([0, *sizes[:-1]], sizes, strict=True):
            chosen = wanted > below
            if size != part:
                chosen &= wanted <= size
            pl.when(chosen)(functools.partial(copy, size))


def _zero_values(tile_smem, valid) -> None:
    """Zero the rows of a block past the request's keys: their weights are 0, but 0 · NaN is NaN."""
    keys, head_dim = tile_smem.shape
    for column in range(0, head_dim, 64):
        part = tile_smem.at[:, pl.ds(column, 64)]
        values = plgpu.load(part, layout=plgpu.Layout.WGMMA)
        key = plgpu.broadcasted_iota(jnp.int32, (keys, 64), 0, layout=plgpu.Layout.WGMMA)
        part[...] = jnp.where(key < valid, values, jnp.zeros_like(values))
    plgpu.commit_smem()


def _scaled(shape: _Shape, logits):
    """Logits in base 2: scale, soft cap and log2(e) applied."""
    if shape.softcap is None:
        return logits * (shape.scale * LOG2E)
    return jnp.tanh(logits * (shape.scale / shape.softcap)) * (shape.softcap * LOG2E)


def _mask(shape: _Shape, logits, block, length, within):
    """-inf where a key lies after a query's position, before its window, or past the length."""
    key = plgpu.broadcasted_iota(jnp.int32, logits.shape, 0, layout=plgpu.Layout.WGMMA)
    key = key + block * shape.config.block
    if shape.T == 1:
        position = length - 1
    else:
        row = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=plgpu.Layout.WGMMA) - within
        position = length - shape.T
        for t in range(1, shape.T):
            position = position + (row >= t * shape.G).astype(jnp.int32)
    visible = key <= position
    if shape.left_window is not None:
        visible &= key >= position - shape.left_window
    return jnp.where(visible, logits, -jnp.inf)


def _merge(shape: _Shape, dtype, lengths, piece_out, piece_lse, firsts):
    """Merge the pieces of each segment: output `[B·K, R, H]`, natural lse `[B·K, rows]`."""
    segments = shape.B * shape.K
    kernel = plgpu.kernel(
        functools.partial(_merge_body, shape),
        out_type=(
            jax.ShapeDtypeStruct((segments, shape.R, shape.H), dtype),
            jax.ShapeDtypeStruct((segments, shape.rows), jnp.float32),
        ),
        scratch_types=dict(
            out_smem=plgpu.SMEM((shape.rows, _MERGE_COLUMNS), dtype),
        ),
        grid=(shape.H // _MERGE_COLUMNS, shape.K, shape.B),
        grid_names=("part", "head", "request"),
        kernel_name="decode_attention_merge",
        compiler_params=_COMPILER,
    )
    return kernel(lengths, piece_out, piece_lse, firsts)


def _merge_body(
    shape: _Shape, lengths_gmem, piece_out, piece_lse, firsts_gmem, out_gmem, lse_gmem, *, out_smem
):
    part, head, request = (lax.axis_index(name) for name in ("part", "head", "request"))
    first_piece, pieces = shape.division.pieces_of(
        request, lengths_gmem[request], first_unit=firsts_gmem[request], share=firsts_gmem[shape.B]
    )
    first_piece = first_piece + head * shape.division.pieces
    columns = pl.ds(part * _MERGE_COLUMNS, _MERGE_COLUMNS)

    along_rows = plgpu.Layout.WGMMA.reduce(0)
    tile = (_MERGE_COLUMNS, shape.rows)
    peak = plgpu.layout_cast(jnp.full((shape.rows,), -jnp.inf, jnp.float32), along_rows)
    total = plgpu.layout_cast(jnp.zeros((shape.rows,), jnp.float32), along_rows)
    acc = plgpu.layout_cast(jnp.zeros(tile, jnp.float32), plgpu.Layout.WGMMA)

    def add_group(group, carry):
        """Add `_MERGE_GROUP` pieces at once: their loads wait for memory together."""
        acc, total, peak = carry
        lses, parts = [], []
        for i in range(_MERGE_GROUP):
            index = group * _MERGE_GROUP + i
            piece = first_piece + lax.min(index, pieces - 1)
            lse = plgpu.load(piece_lse.at[piece], layout=along_rows, optimized=False)
            absent = jnp.where(index < pieces, 0.0, -jnp.inf).astype(jnp.float32)
            lses.append(lse + absent)
            parts.append(
                plgpu.load(piece_out.at[piece, columns], layout=plgpu.Layout.WGMMA, optimized=False)
            )
        new_peak = functools.reduce(jnp.maximum, lses, peak)
        safe = jnp.where(new_peak == -jnp.inf, 0.0, new_peak)
        correction = jnp.exp2(peak - safe)
        acc = acc * lax.broadcast_in_dim(correction, acc.shape, [1])
        total = total * correction
        for lse, value in zip(lses, parts, strict=True):
            weight = jnp.exp2(lse - safe)
            acc = acc + value * lax.broadcast_in_dim(weight, acc.shape, [1])
            total = total + weight
        return acc, total, new_peak

    groups = lax.div(pieces + _MERGE_GROUP - 1, jnp.int32(_MERGE_GROUP))
    acc, total, peak = lax.fori_loop(0, groups, add_group, (acc, total, peak))
    seen = total > 0.0
    divisor = jnp.where(seen, total, 1.0)
    result = acc / lax.broadcast_in_dim(divisor, acc.shape, [1])
    out_smem.T[...] = plgpu.layout_cast(
        result.astype(out_smem.dtype), plgpu.Layout.WGMMA_TRANSPOSED
    )
    plgpu.commit_smem()
    index = request * shape.K + head
    within = shape.tile_of(index)[1]
    plgpu.copy_smem_to_gmem(
        out_smem.at[pl.ds(within, shape.R)], out_gmem.at[index, pl.ds(0, shape.R), columns]
    )

    @pl.when(part == 0)
    def _():
        lse_gmem[index] = jnp.where(seen, (peak + jnp.log2(divisor)) / LOG2E, -jnp.inf)

    plgpu.wait_smem_to_gmem(0)
