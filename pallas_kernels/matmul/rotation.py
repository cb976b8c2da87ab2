"""What follows the projection of one token per request to queries, keys and values.

Queries and keys are normalised if the model does that, and rotated (RoPE), and keys and values go
into the pages of a cache, all from the registers that hold the product: no launch in between, and
nothing of it in memory.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels import plgpu
from jaxinfer.pallas_kernels.matmul.norm import Norm
from jaxinfer.pallas_kernels.plgpu import pl

# A copy per token and half of a head: more of them are better made by a kernel of their own.
MAX_TOKENS = 16


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


@dataclasses.dataclass(frozen=True, slots=True)
class Heads:
    """Columns of the projection: query heads, key heads, value heads.

    A tile is a head, in two banks: its first half and its second, which are rotated together.

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

    def normalised(self, halves, head, q_gmem, k_gmem) -> tuple[Any, Any]:
        """Both halves of a head under its norm, unless it holds values.

        Args:
            halves: `[H/2, rows]` float32, two.
            head: Its number.
            q_gmem: `[H]` weight of the queries' norm.
            k_gmem: `[H]` of the keys'.
        """
        assert self.eps is not None, "asked for"
        shape = halves[0].shape
        is_key = head >= self.N
        is_value = jnp.where(head >= self.N + self.K, 1.0, 0.0).astype(jnp.float32)
        eps = jnp.where(is_key, self.eps[1], self.eps[0]).astype(jnp.float32)
        squares = sum((half * half).sum(axis=0) for half in halves)
        scale = lax.broadcast_in_dim(lax.rsqrt(squares / self.H + eps), shape, [1])

        def weight(i: int):
            def of(gmem):
                part = gmem.at[pl.ds(i * shape[0], shape[0])]
                along = plgpu.Layout.WGMMA.reduce(1)
                return plgpu.load(part, layout=along, optimized=False).astype(jnp.float32)

            chosen = lax.cond(is_key, lambda: of(k_gmem), lambda: of(q_gmem))
            return lax.broadcast_in_dim(chosen, shape, [0])

        def normed(i: int, half):
            return half * (scale * weight(i) * (1.0 - is_value) + is_value)

        return normed(0, halves[0]), normed(1, halves[1])

    def rotated(self, halves, head, angles) -> tuple[Any, Any]:
        """Both halves of a head, rotated unless it holds values.

        Args:
            halves: `[H/2, rows]` float32, two.
            head: Its number.
            angles: Cosines and sines, `[H/2, rows]` each.
        """
        (first, second), (cosine, sine) = halves, angles
        is_value = jnp.where(head >= self.N + self.K, 1.0, 0.0).astype(jnp.float32)
        cosine = cosine * (1.0 - is_value) + is_value
        sine = sine * (1.0 - is_value)
        return first * cosine - second * sine, second * cosine + first * sine

    def store(self, halves, head, places, q_gmem, k_gmem, v_gmem) -> None:
        """Send a head's rows to where they belong.

        Args:
            halves: Two tiles `[rows, H/2]` in shared memory, committed.
            head: Its number.
            places: Page and slot of every token.
            q_gmem: `[M, N·H]`.
            k_gmem: `[P, K, p, H]`.
            v_gmem: `[P, K, p, H]`.
        """
        tokens, half = len(places), self.H // 2

        @pl.when(head < self.N)
        def _queries():
            for i, tile in enumerate(halves):
                columns = pl.ds(head * self.H + i * half, half)
                plgpu.copy_smem_to_gmem(tile.at[pl.ds(0, tokens)], q_gmem.at[:, columns])

        def write(pages, number):
            for token, (page, slot) in enumerate(places):

                @pl.when(page >= 0)
                def _token(token=token, page=page, slot=slot):
                    for i, tile in enumerate(halves):
                        target = pages.at[page, number, pl.ds(slot, 1), pl.ds(i * half, half)]
                        plgpu.copy_smem_to_gmem(tile.at[pl.ds(token, 1)], target)

        is_key = (head >= self.N) & (head < self.N + self.K)
        pl.when(is_key)(lambda: write(k_gmem, head - self.N))
        pl.when(head >= self.N + self.K)(lambda: write(v_gmem, head - (self.N + self.K)))
