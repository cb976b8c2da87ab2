"""Shapes that compiled functions are padded to, so that few of them suffice."""

import dataclasses

_COARSE = 1024  # tokens up to which the next power of two is near enough


def round_up(value: int, *, lowest: int, highest: int) -> int:
    """The smallest power of two times `lowest` that holds `value`, at most `highest`.

    >>> round_up(20, lowest=16, highest=100), round_up(70, lowest=16, highest=100)
    (32, 100)
    """
    if value > highest:
        raise ValueError(f"{value} exceeds the largest bucket {highest}")
    bucket = lowest
    while bucket < value:
        bucket *= 2
    return min(bucket, highest)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Buckets:
    """The shapes of one engine.

    Attributes:
        max_num_seqs: Most rows that decode together.
        max_num_batched_tokens: Most tokens of one prefill call, rows times padded length.
        table_width: Most pages of a row.
        fixed: Always the largest number of rows, one request per prefill and whole page tables,
            so that no other request changes the shape of a computation.
        full_tables: Whole page tables where rows decode, for an attention that reads only what
            lengths reach.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    table_width: int
    fixed: bool = False
    full_tables: bool = False

    def rows(self, count: int) -> int:
        """Rows of a decode call for `count` requests."""
        if self.fixed:
            return self.max_num_seqs
        return round_up(count, lowest=1, highest=self.max_num_seqs)

    def prefill_tokens(self, count: int) -> int:
        """Padded length of a chunk of `count` tokens."""
        most = self.max_num_batched_tokens
        bucket = round_up(count, lowest=min(16, most), highest=most)
        if bucket <= _COARSE:
            return bucket
        # Padding costs as much as tokens do: between long buckets there are three more.
        step = -(-bucket // 8)
        return min(-(-count // step) * step, most)

    def prefill_rows(self, count: int, tokens: int) -> int:
        """Rows of a prefill call of `count` prompts padded to `tokens`."""
        return round_up(count, lowest=1, highest=max(self.max_num_batched_tokens // tokens, 1))

    def decode_width(self, pages: int) -> int:
        """Columns of the page table of a decode call that must reach `pages` pages."""
        return self.table_width if self.full_tables else self.prefill_width(pages)

    def prefill_width(self, pages: int) -> int:
        """Columns of the page table of a prefill call; its attention reads them all."""
        if self.fixed:
            return self.table_width
        return round_up(max(pages, 1), lowest=min(4, self.table_width), highest=self.table_width)
