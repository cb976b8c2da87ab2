"""Attention of a rank's queries over the pieces that one exchange brought.

Every mask that occurs between the tokens of two ranks is one that `attention` has. Between chunks
of consecutive tokens it is all or nothing: with the pieces that a query chunk sees in front, it is
a number of keys. Between stripes it is the causal mask, shifted by the piece's place and, where
the keys' owner comes after the queries', by one more token (`stripes.py`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.pallas_kernels import attention, merge_attention
from jaxinfer.sharding.sequence_parallel.layout import Layout
from jaxinfer.sharding.sequence_parallel.placement import count_before
from jaxinfer.sharding.sequence_parallel.stripes import Part, nothing, windowed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Local:
    """The attention that one rank computes.

    Attributes:
        layout: Tokens of all ranks.
        rank: r, traced.
        is_causal: Whether keys after the query's position are hidden.
        lengths: `[B]` int32 tokens of each row of the whole sequence, or None: all.
        residual: Whether log-sum-exps are needed: a call alone may do without, and then more
            implementations can serve it.
        left: Keys visible before a query's position in the whole sequence (striped placement
            only); None: all.
        options: `scale`, `logits_softcap` and `implementation` of `attention`.
    """

    layout: Layout
    rank: jax.Array
    is_causal: bool
    lengths: jax.Array | None
    residual: bool
    left: int | None
    options: dict[str, Any]

    def attend(self, query: jax.Array, key: jax.Array, value: jax.Array, **mask: Any) -> Part:
        """Call `attention`; the output is widened, because parts are going to be merged."""
        if self.residual:
            out, lse = attention(query, key, value, return_residual=True, **mask, **self.options)
        else:
            out = attention(query, key, value, **mask, **self.options)
            lse = jnp.zeros(out.shape[:3], jnp.float32)  # nobody reads it
        return out.astype(jnp.float32), lse

    def own(self, query: jax.Array, key: jax.Array, value: jax.Array) -> Part:
        """Attend over the rank's own block: tokens ascend, so the mask is the plain one."""
        # Neighbours in a stripe are n positions apart.
        window = None if self.left is None else (self.left // self.layout.num_ranks, 0)
        return self.attend(
            query, key, value, is_causal=self.is_causal, key_value_seq_lengths=self.own_lengths(),
            local_window_size=window,
        )  # fmt: skip

    def own_lengths(self) -> jax.Array | None:
        """`[B]` tokens of the own block that lie before `lengths`, or None: all."""
        if self.lengths is None:
            return None
        layout = self.layout
        return count_before(
            self.lengths, layout.placement, self.rank, layout.num_ranks, layout.tokens_per_rank
        )

    def arrived(
        self,
        state: Part | None,
        query: jax.Array,
        pieces: jax.Array,
        owner: jax.Array,
        number: jax.Array,
    ) -> Part:
        """Attend over pieces and merge with what was there before.

        Args:
            state: Output and log-sum-exp over other keys; None: none yet.
            query: `[B, c, N, H]` the rank's queries.
            pieces: `[lanes, 2, B, chunks, p, K, H]`.
            owner: `[lanes]` int32 rank that owns each piece.
            number: `[lanes]` int32 number of each among its owner's pieces.

        Returns:
            The merged output `[B, c, N, H]` and log-sum-exp `[B, c, N]`, float32.
        """
        if self.layout.placement == "striped" and (self.is_causal or self.lengths is not None):
            return self._stripes(state, query, pieces, owner, number)
        if not self.is_causal:
            part = self._full(query, pieces, owner, number)
        elif len(pieces) == 1:
            part = self._one_piece(query, pieces[0], owner, number)
        else:
            part = self._chunks(query, pieces, owner, number)
        return part if state is None else merge_attention([state, part])

    def _full(self, query, pieces, owner, number) -> Part:
        """Every query sees every piece."""
        layout, (lanes, _, B) = self.layout, pieces.shape[:3]
        parts = jnp.moveaxis(pieces, 3, 0).reshape(layout.chunks * lanes, *pieces.shape[1:3],
                                                   *pieces.shape[4:])  # fmt: skip
        if self.lengths is None:
            return self.attend(query, *_join(parts))
        seen = [layout.part_lengths(owner, number, chunk, self.lengths, B)
                for chunk in range(layout.chunks)]  # fmt: skip
        return self._sorted(query, parts, jnp.concatenate(seen, axis=1))

    def _one_piece(self, query, piece, owner, number) -> Part:
        """Causal, one piece: a rank does exactly the work that the mask leaves.

        If the owner comes before this rank, all queries see the piece's early tokens and none of
        its late ones; otherwise the late queries see all of it and the early ones nothing.
        """
        layout, B = self.layout, query.shape[0]
        early = piece[:, :, 0]
        seen = None
        if self.lengths is not None:
            seen = [layout.part_lengths(owner, number, chunk, self.lengths, B)[:, 0]
                    for chunk in range(layout.chunks)]  # fmt: skip

        def before() -> Part:
            return self.attend(query, *early, key_value_seq_lengths=seen and seen[0])

        def after() -> Part:
            if layout.chunks == 1:
                return nothing(query)
            half = layout.chunk_tokens
            both = jnp.concatenate([early, piece[:, :, 1]], axis=2)
            late = self.attend(
                query[:, half:], *both, key_value_seq_lengths=seen and seen[0] + seen[1]
            )
            return _rows(nothing(query[:, :half]), late)

        return lax.cond(owner[0] < self.rank, before, after)

    def _chunks(self, query, pieces, owner, number) -> Part:
        """Causal, several pieces: for each query chunk, the parts that come before it.

        Chunks of different ranks do not overlap: a part is seen by all of a chunk or by none.
        """
        layout, B = self.layout, query.shape[0]
        held = [layout.part_lengths(owner, number, chunk, self.lengths, B)
                for chunk in range(layout.chunks)]  # fmt: skip
        before = owner < self.rank
        early = self._sorted(
            query[:, : layout.chunk_tokens], pieces[:, :, :, 0], jnp.where(before, held[0], 0)
        )
        if layout.chunks == 1:
            return early
        parts = jnp.concatenate([pieces[:, :, :, 0], pieces[:, :, :, 1]])
        seen = jnp.concatenate([held[0], jnp.where(before, 0, held[1])], axis=1)
        return _rows(early, self._sorted(query[:, layout.chunk_tokens :], parts, seen))

    def _sorted(self, query, parts, seen) -> Part:
        """Attend over the first `seen` `[B, parts]` tokens of parts `[parts, 2, B, p, K, H]`.

        At most one part of a row is seen in part, the one in which its length ends. Sorted by
        `seen`, descending, the tokens that are seen are therefore the first ones.
        """
        order = jnp.argsort(-seen, axis=1).T[:, None, :]
        kv, row = jnp.arange(2)[:, None], jnp.arange(query.shape[0])
        key, value = _join(parts[order, kv, row])
        return self.attend(query, key, value, key_value_seq_lengths=seen.sum(axis=1))

    def _stripes(self, state, query, pieces, owner, number) -> Part:
        """Striped: token j of piece x of rank o is at (x·p + j)·n + o, query i at i·n + r."""
        layout, B = self.layout, query.shape[0]
        seen = None
        if self.lengths is not None:
            seen = layout.part_lengths(owner, number, 0, self.lengths, B).T
        if len(pieces) == 1:
            part = self._one_stripe(query, pieces[0], owner[0], None if seen is None else seen[0])
            return part if state is None else merge_attention([state, part])

        def attend(piece, owner, number, seen) -> Part:
            if layout.pieces == 1:
                return self._one_stripe(query, piece, owner, seen)
            key, value = piece[:, :, 0]
            if not self.is_causal:
                return self.attend(query, key, value, key_value_seq_lengths=seen)
            shift = jnp.where(owner <= self.rank, 0, -1) - number * layout.part_tokens
            offset = jnp.broadcast_to(shift, (B,))
            return self._windowed(
                lambda **window: self.attend(
                    query, key, value, is_causal=True, q_offset=offset,
                    key_value_seq_lengths=seen, **window,
                ), query, owner,
            )  # fmt: skip

        # A scan: a part of the keys costs a merge of all queries, and only one is in memory.
        lanes = (pieces, owner, number, seen)
        if state is None:
            state = nothing(query)
        return lax.scan(
            lambda state, lane: (merge_attention([state, attend(*lane)]), None), state, lanes
        )[0]

    def _one_stripe(self, query, piece, owner, seen) -> Part:
        """A whole stripe. Its mask is the plain causal one, without an offset to it.

        Offsets shut out implementations, and where a query sees the keys before its own only, the
        first query and the last key can be left out instead.
        """
        key, value = piece[:, :, 0]
        if not self.is_causal:
            return self.attend(query, key, value, key_value_seq_lengths=seen)

        def before() -> Part:
            return self._windowed(
                lambda **window: self.attend(
                    query, key, value, is_causal=True, key_value_seq_lengths=seen, **window
                ), query, owner,
            )  # fmt: skip

        def after() -> Part:
            none = nothing(query[:, :1])
            if query.shape[1] == 1:
                return none
            held = None if seen is None else jnp.minimum(seen, key.shape[1] - 1)
            rest = self._windowed(
                lambda **window: self.attend(
                    query[:, 1:], key[:, :-1], value[:, :-1], is_causal=True,
                    key_value_seq_lengths=held, **window,
                ), query[:, 1:], owner,
            )  # fmt: skip
            return _rows(none, rest)

        return lax.cond(owner <= self.rank, before, after)

    def _windowed(self, attend, query, owner) -> Part:
        n = self.layout.num_ranks
        return windowed(attend, query, left=self.left, apart=(self.rank - owner) % n, num_ranks=n)


def _join(parts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Parts `[parts, 2, B, p, K, H]` one after another: keys and values `[B, parts·p, K, H]`."""
    joined = jnp.moveaxis(parts, 0, 2)
    joined = joined.reshape(*joined.shape[:2], -1, *joined.shape[4:])
    return joined[0], joined[1]


def _rows(first: Part, second: Part) -> Part:
    out, lse = (jnp.concatenate(pair, axis=1) for pair in zip(first, second, strict=True))
    return out, lse
