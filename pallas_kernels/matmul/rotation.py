"""What follows the projection of one token per request to queries, keys and values.

Queries and keys are normalised if the model does that, and rotated (RoPE), and keys and values go
into the pages of a cache, all from the registers that hold the product: no launch in between, and
nothing of it in memory.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels import plgpu
from jaxinfer.pallas_kernels.matmul.norm import Norm
from jaxinfer.pallas_kernels.plgpu import pl

_AT_ONCE = 16  # tokens whose places are read at once
HEAD_DIMS = (64, 128, 256)  # that are a bank of 64 or 128 columns, or two of them


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("cos", "sin", "page", "slot", "k_pages", "v_pages", "q_norm", "k_norm"),
    meta_fields=("num_heads",),
)
@dataclasses.dataclass(frozen=True, slots=True)
class Rotation:
    """Rotation and cache write of M tokens, each of another request.

    Attributes:
        cos: `[M, H/2]` float32.
        sin: `[M, H/2]` float32.
        page: `[M]` int32, page that a token goes to; -1: none.
        slot: `[M]` int32, where in the page.
        k_pages: `[P, K, p, H]`.
        v_pages: `[P, K, p, H]`.
        num_heads: N, query heads.
        q_norm: RMSNorm of a query head, or None.
        k_norm: RMSNorm of a key head; there is one if there is one for queries.
    """

    cos: Any
    sin: Any
    page: Any
    slot: Any
    k_pages: Any
    v_pages: Any
    num_heads: int
    q_norm: Norm | None = None
    k_norm: Norm | None = None

    @property
    def heads(self) -> "Heads":
        """How the columns of the product are divided, and what happens to them."""
        eps = None
        if self.q_norm is not None and self.k_norm is not None:
            eps = (self.q_norm.eps, self.k_norm.eps)
        return Heads(self.num_heads, self.k_pages.shape[1], self.k_pages.shape[3], eps)


class Places:
    """Where tokens go. Of a few, pages and slots are read at once and kept in registers.

    Attributes:
        tokens: M.
    """

    def __init__(self, tokens: int, page_gmem, slot_gmem):
        """Read where the first tokens go.

        Args:
            tokens: M.
            page_gmem: `[M]` int32, as `padded` makes it; -1: nowhere.
            slot_gmem: As `page_gmem`.
        """
        self.tokens, self._gmem = tokens, (page_gmem, slot_gmem)
        self._known = self._read(0) if tokens <= _AT_ONCE else None

    @staticmethod
    def padded(places: jax.Array) -> jax.Array:
        """`[M]` pages or slots, so many that they can be read several at once."""
        missing = -len(places) % _AT_ONCE if len(places) > _AT_ONCE else 0
        return jnp.pad(places, (0, missing), constant_values=-1)

    def each(self, write: Callable[[Any, Any, Any], None]) -> None:
        """Call `write(token, page, slot)` for every token that goes somewhere."""
        if self._known is not None:
            self._call(write, 0, self._known)
            return

        @pl.loop(0, -(-self.tokens // _AT_ONCE))
        def _several(i):
            self._call(write, i * _AT_ONCE, self._read(i * _AT_ONCE))

    def _read(self, first) -> list[tuple[Any, Any]]:
        count = min(self.tokens, _AT_ONCE)
        return [tuple(gmem[first + i] for gmem in self._gmem) for i in range(count)]

    def _call(self, write, first, places) -> None:
        for i, (page, slot) in enumerate(places):
            pl.when(page >= 0)(functools.partial(write, first + i, page, slot))


@dataclasses.dataclass(frozen=True, slots=True)
class Heads:
    """Columns of the projection: query heads, key heads, value heads.

    A tile is a head. One of 128 or 256 columns is in two banks, its first half and its second: what
    is rotated together lies in the same thread. One of 64 is a single bank, and the other half's
    elements come through shared memory.

    Attributes:
        N: Query heads.
        K: Heads of keys, and of values.
        H: Width of a head.
        eps: Added to the mean squares of queries and keys; None: they are not normalised.
    """

    N: int
    K: int
    H: int
    eps: tuple[float, float] | None = None

    @property
    def is_wide(self) -> bool:
        """More than 64 columns: what is rotated together lies in two arrays of registers."""
        return self.H > 64

    @property
    def most_tokens(self) -> int:
        """Whose elements, cosines and sines lie in 128 registers of a thread at once: 64 or 32."""
        return 4096 // self.bank

    @property
    def banks(self) -> int:
        """Of a tile."""
        return 2 if self.is_wide else 1

    @property
    def bank(self) -> int:
        """Columns of a bank."""
        return self.H // 2 if self.is_wide else self.H

    def angles(self, cos, sin) -> tuple[Any, Any]:
        """`[M, bank]` factors of an element and of the one it is rotated with, float32.

        Args:
            cos: `[M, H/2]`.
            sin: `[M, H/2]`.
        """
        cos, sin = cos.astype(jnp.float32), sin.astype(jnp.float32)
        if self.is_wide:
            return cos, sin
        return jnp.concatenate([cos, cos], axis=1), jnp.concatenate([-sin, sin], axis=1)

    def scratch(self, rows: int) -> dict[str, Any]:
        """Shared memory in which a head of one bank is turned by half its width."""
        if self.is_wide:
            return {}
        layout = plgpu.FLOAT32_TILES
        return {"turned_smem": plgpu.SMEM((2 * self.H, rows), jnp.float32, transforms=layout)}

    @property
    def tiles(self) -> int:
        """Tiles of 16-bit elements on their way out, and in `scratch`."""
        return self.banks if self.is_wide else 5

    def normalised(self, banks, head, q_gmem, k_gmem) -> list[Any]:
        """A head under its norm, unless it holds values.

        Args:
            banks: `[bank, rows]` float32 each.
            head: Its number.
            q_gmem: `[H]` weight of the queries' norm.
            k_gmem: `[H]` of the keys'.
        """
        assert self.eps is not None, "asked for"
        shape = banks[0].shape
        is_key = head >= self.N
        eps = jnp.where(is_key, self.eps[1], self.eps[0]).astype(jnp.float32)
        squares = sum((bank * bank).sum(axis=0) for bank in banks)
        scale = lax.broadcast_in_dim(lax.rsqrt(squares / self.H + eps), shape, [1])

        def weight(i: int):
            def of(gmem):
                part = gmem.at[pl.ds(i * shape[0], shape[0])]
                along = plgpu.Layout.WGMMA.reduce(1)
                return plgpu.load(part, layout=along, optimized=False).astype(jnp.float32)

            chosen = lax.cond(is_key, lambda: of(k_gmem), lambda: of(q_gmem))
            return lax.broadcast_in_dim(chosen, shape, [0])

        def normed():
            return tuple(bank * scale * weight(i) for i, bank in enumerate(banks))

        return self._unless_values(head, banks, normed)

    def _unless_values(self, head, banks, change) -> list[Any]:
        """What `change` makes of a head. Values stay as they are, whatever they are: no 0 · Inf."""
        return list(lax.cond(head >= self.N + self.K, lambda: tuple(banks), change))

    def rotated(self, banks, head, angles, turned_smem) -> list[Any]:
        """A head, rotated unless it holds values.

        Args:
            banks: `[bank, rows]` float32 each.
            head: Its number.
            angles: As `angles` made them, `[bank, rows]` each.
            turned_smem: The scratch of that name, if there is one.
        """
        cosine, sine = angles

        def in_banks():
            first, second = banks
            return first * cosine - second * sine, second * cosine + first * sine

        def through_memory():
            (bank,) = banks
            for copy in (0, self.H):
                turned_smem[pl.ds(copy, self.H)] = bank
            turned = turned_smem.at[pl.ds(self.H // 2, self.H)]
            other = plgpu.load(turned, layout=plgpu.Layout.WGMMA, optimized=False)
            return (bank * cosine + other * sine,)

        return self._unless_values(head, banks, in_banks if self.is_wide else through_memory)

    def store(self, banks, head, places, q_gmem, k_gmem, v_gmem) -> None:
        """Send a head's rows to where they belong.

        Args:
            banks: Tiles `[rows, bank]` in shared memory, committed.
            head: Its number.
            places: How many tokens there are, and page and slot of each.
            q_gmem: `[M, N·H]`.
            k_gmem: `[P, K, p, H]`.
            v_gmem: `[P, K, p, H]`.
        """
        width = self.bank

        @pl.when(head < self.N)
        def _queries():
            for i, tile in enumerate(banks):
                columns = pl.ds(head * self.H + i * width, width)
                plgpu.copy_smem_to_gmem(tile.at[pl.ds(0, places.tokens)], q_gmem.at[:, columns])

        def write(pages, number):
            @places.each
            def _token(token, page, slot):
                for i, tile in enumerate(banks):
                    columns = pl.ds(i * width, width)
                    target = pages.at[page, number, pl.ds(slot, 1), columns]
                    plgpu.copy_smem_to_gmem(tile.at[pl.ds(token, 1)], target)

        is_key = (head >= self.N) & (head < self.N + self.K)
        pl.when(is_key)(lambda: write(k_gmem, head - self.N))
        pl.when(head >= self.N + self.K)(lambda: write(v_gmem, head - (self.N + self.K)))
