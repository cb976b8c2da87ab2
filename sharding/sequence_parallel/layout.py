"""A rank's block of keys and values, cut into the pieces that travel."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxinfer.sharding.sequence_parallel.placement import Placement, chunks_per_rank, count_before


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where the tokens of every piece of every rank lie in the whole sequence.

    A chunk is a run of tokens at equal distances; a rank holds one, or two in zigzag. Piece j of a
    rank is the j-th of m equal parts of each of its chunks, so that in zigzag every piece has an
    early and a late half and causal work stays even (TASP, arXiv 2509.26541).

    Attributes:
        placement: `"contiguous"`, `"zigzag"` or `"striped"`.
        num_ranks: n.
        tokens_per_rank: c, tokens of a block.
        pieces: m, pieces of a block.

    Raises:
        ValueError: If the placement is unknown, or a chunk cannot be cut into m equal parts.
    """

    placement: Placement
    num_ranks: int
    tokens_per_rank: int
    pieces: int

    def __post_init__(self) -> None:
        multiple = self.chunks * self.pieces
        if self.tokens_per_rank % multiple:
            padded = -(-self.tokens_per_rank // multiple) * multiple
            raise ValueError(
                f"tokens per rank must be a multiple of {multiple} ({self.placement} placement, "
                f"{self.pieces} pieces per rank); got {self.tokens_per_rank}: pad the sequence to "
                f"{padded * self.num_ranks} tokens (padded_length) and pass lengths"
            )

    @property
    def chunks(self) -> int:
        """Chunks of a block."""
        return chunks_per_rank(self.placement)

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a chunk."""
        return self.tokens_per_rank // self.chunks

    @property
    def part_tokens(self) -> int:
        """p, tokens that a piece has of a chunk."""
        return self.chunk_tokens // self.pieces

    def cut(self, key: jax.Array, value: jax.Array) -> jax.Array:
        """Cut `[B, c, K, H]` keys and values into pieces `[m, 2, B, chunks, p, K, H]`.

        Keys and values of a piece lie together, so that a message is one run of memory.
        """
        both = jnp.stack([key, value])
        shape = (*both.shape[:2], self.chunks, self.pieces, self.part_tokens, *both.shape[3:])
        return jnp.moveaxis(both.reshape(shape), 3, 0)

    def chunk_number(self, rank: jax.Array, chunk: int) -> jax.Array:
        """Place in the sequence of a rank's first or second chunk (not for striped)."""
        return rank if chunk == 0 else 2 * self.num_ranks - 1 - rank

    def part_lengths(
        self, owner: jax.Array, number: jax.Array, chunk: int, lengths: jax.Array | None, batch: int
    ) -> jax.Array:
        """Tokens of a part that lie before `lengths`.

        Args:
            owner: `[lanes]` rank that owns each piece.
            number: `[lanes]` number of the piece among its owner's.
            chunk: 0 or 1.
            lengths: `[B]` tokens of each row, or None: all.
            batch: B.

        Returns:
            `[B, lanes]` from 0 to p.
        """
        p = self.part_tokens
        if lengths is None:
            return jnp.full((batch, owner.shape[0]), p, jnp.int32)
        if self.placement == "striped":
            held = count_before(
                lengths[:, None], "striped", owner, self.num_ranks, self.tokens_per_rank
            )
            return jnp.clip(held - number * p, 0, p)
        start = self.chunk_number(owner, chunk) * self.chunk_tokens + number * p
        return jnp.clip(lengths[:, None] - start, 0, p)
