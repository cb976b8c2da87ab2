"""The tokens of a call, shared by the devices of the mesh axis `seq`.

Token g of a sequence is on device g mod n: its keys and values are in that device's pages, and that
device computes it, wherever the call begins. So prompts, later chunks and steps all find the cache
in the same order, keys are written where they were computed, every device has the same share of
the causal work, and no length has to be divisible by anything.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.sharding.mesh import SEQ
from jaxinfer.sharding.sequence_parallel.paged import (
    striped_chunk_attention,
    striped_decode_attention,
    tokens_held,
)
from jaxinfer.sharding.sequence_parallel.placement import unplace
from jaxinfer.sharding.sequence_parallel.ring import plan_for, ring_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedTokens:
    """The t of T tokens of every row that one device computes; made inside `jax.shard_map`.

    A single token (T = 1) is computed by all, since none has anything else to do; the one that it
    belongs to keeps its key and value.

    Attributes:
        num_devices: n, along `seq`.
        length: T.
        begin: `[B]` int32 tokens in the cache before the call, on all devices together.
        count: `[B]` int32 real tokens of the call.
        index: `[B, t]` int32 which of the T tokens are here; some may be T or more.
        start: `[B]` int32 tokens in this device's pages before the call.
        num_tokens: `[B]` int32 tokens that the call adds to them.
    """

    num_devices: int
    length: int
    begin: jax.Array
    count: jax.Array
    index: jax.Array
    start: jax.Array
    num_tokens: jax.Array

    @classmethod
    def create(cls, length: int, begin: jax.Array, count: jax.Array, n: int) -> "SharedTokens":
        """Share T tokens of every row.

        Args:
            length: T.
            begin: `[B]` int32 tokens in the cache.
            count: `[B]` int32 real tokens.
            n: Devices along `seq`.
        """
        rank = jax.lax.axis_index(SEQ)
        start = tokens_held(begin, rank, n)
        index = jnp.zeros((len(begin), 1), jnp.int32)
        if length > 1:
            first = (rank - begin) % n
            index = first[:, None] + n * jnp.arange(-(-length // n), dtype=jnp.int32)
        return cls(
            num_devices=n, length=length, begin=begin, count=count, index=index, start=start,
            num_tokens=tokens_held(begin + count, rank, n) - start,
        )  # fmt: skip

    def positions(self) -> Int[Array, "B t"]:
        """Of the tokens here, in the whole sequence."""
        return self.begin[:, None] + self.index

    def take(self, tokens: Int[Array, "B T"]) -> Int[Array, "B t"]:
        """The tokens here; where there is none, any."""
        return jnp.take_along_axis(tokens, self.index, axis=1, mode="clip")

    def gather(self, hidden: Float[Array, "B t D"], *, fresh: bool) -> Float[Array, "B T D"]:
        """What all devices have computed, in the order of the tokens.

        Args:
            hidden: Of the tokens here.
            fresh: `begin` is 0 in all rows, so that they are in one order.
        """
        if self.length == 1:
            return hidden
        every = jax.lax.all_gather(hidden, SEQ, axis=1, tiled=True)
        if fresh:
            return unplace(every, "striped", self.num_devices)[:, : self.length]
        token = jnp.arange(self.length, dtype=jnp.int32)
        device = (self.begin[:, None] + token) % self.num_devices
        at = device * hidden.shape[1] + token // self.num_devices
        return jnp.take_along_axis(every, at[..., None], axis=1)

    def attend(
        self,
        q: Float[Array, "B t N H"],
        k: Float[Array, "B t K H"],
        v: Float[Array, "B t K H"],
        k_pages: jax.Array,
        v_pages: jax.Array,
        page_table: Int[Array, "B M"],
        *,
        fresh: bool,
        counters: jax.Ref | None,
        **options: Any,
    ) -> Float[Array, "B t N H"]:
        """Attend from the tokens here to those before them on all devices.

        Args:
            q: Rotated queries of the tokens here.
            k: Rotated keys.
            v: Values.
            k_pages: This device's `[P, K, p, H]`, the keys written.
            v_pages: As `k_pages`.
            page_table: `[B, M]` int32.
            fresh: `begin` is 0 in all rows.
            counters: As in `decode_attention`, for one token.
            options: `scale`, `logits_softcap` and `local_window_size` of `attention`.
        """
        pages = (k_pages, v_pages, page_table)
        if self.length == 1:
            lengths = jnp.where(self.count > 0, self.begin + self.count, 0)
            return striped_decode_attention(
                q, *pages, lengths, axis_name=SEQ, counters=counters, **options
            )
        if not fresh:
            return striped_chunk_attention(
                q, k, v, *pages, self.start, self.num_tokens, axis_name=SEQ, **options
            )
        return _prompt_attention(q, k, v, self.num_devices, **options)


def _prompt_attention(q: jax.Array, k: jax.Array, v: jax.Array, n: int, **options: Any) -> Any:
    """Causal attention of whole prompts, by the schedule and transport that the model prefers."""
    B, t, N, H = q.shape
    chosen = plan_for(
        n, (B, t, N, H), k.shape[2], q.dtype.itemsize, schedule=None, transport=None, topology=None,
        placement="striped", is_causal=True, any_length=True,
    )  # fmt: skip
    pieces = 1 if chosen.transport == "all_gather" else chosen.schedule.pieces_per_rank
    # Padding comes after all tokens, so that causality hides it.
    missing = [(0, 0), (0, -t % pieces), (0, 0), (0, 0)]
    padded = (jnp.pad(x, missing) if t % pieces else x for x in (q, k, v))
    out = ring_attention(
        *padded, axis_name=SEQ, placement="striped", schedule=chosen.schedule,
        transport=chosen.transport, **options,
    )  # fmt: skip
    return out[:, :t]
