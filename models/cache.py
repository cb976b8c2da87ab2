"""The paged key/value cache as the model sees it: pages, page tables, lengths."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxinfer.models.config import DecoderConfig
from jaxinfer.models.dtypes import check_floating
from jaxinfer.models.parallel.axes import PAGES, RULES
from jaxinfer.models.parallel.parallel import Parallel
from jaxinfer.models.pytree import pytree
from jaxinfer.sharding.rules import partition_spec

PAGE_SIZES = (16, 32, 64, 128)


@pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedKVCache:
    """Keys and values of every request, stored in pages of `p` tokens.

    A page holds one layer's keys (or values) of `p` consecutive tokens for all KV heads, one
    head's part contiguous: `[K, p, H]`. Which pages belong to a request, in order, is its row of
    `page_table`; entries past `ceil(length / p)` are not read. The same table serves all layers.

    The cache of a model that is divided over devices has the heads of all of them, padding and
    copies included, and each device has its own heads' part of every page. Along the mesh axis
    `seq` each of n devices has the tokens whose position is its number modulo n: a page has n times
    as many tokens, of which every device holds p.

    Attributes:
        k_pages: L arrays `[P, K, p, H]`; along `seq` `[P, K, n·p, H]`, device after device.
        v_pages: As `k_pages`.
        page_table: `[B, M]` int32, page numbers below P.
        lengths: `[B]` int32, tokens held for each row.
    """

    k_pages: tuple[jax.Array, ...]
    v_pages: tuple[jax.Array, ...]
    page_table: jax.Array
    lengths: jax.Array

    @classmethod
    def create(
        cls,
        config: DecoderConfig,
        *,
        batch_size: int,
        max_len: int,
        page_size: int = 64,
        num_pages: int | None = None,
        dtype: Any = jnp.bfloat16,
        parallel: Parallel | None = None,
    ) -> "PagedKVCache":
        """Allocate an empty cache in which row b owns pages b·M … b·M + M - 1.

        Args:
            config: The model's shape.
            batch_size: B.
            max_len: Tokens a row can hold; rounded up to whole pages.
            page_size: p, tokens of a page on one device: 16, 32, 64 or 128.
            num_pages: P; default `batch_size` times the pages of a row.
            dtype: Of keys and values.
            parallel: How the model is divided (`Decoder.parallel`).

        Raises:
            ValueError: a size that is not positive, or a page size that kernels lack.
            TypeError: a dtype that is not floating.
            jax.errors.JaxRuntimeError: the device lacks the memory (RESOURCE_EXHAUSTED).
        """
        check_floating(dtype)
        if page_size not in PAGE_SIZES:
            raise ValueError(f"page_size must be one of {PAGE_SIZES}; got {page_size}")
        if batch_size < 1 or max_len < 1 or (num_pages is not None and num_pages < 1):
            raise ValueError(
                "batch_size, max_len and num_pages must be positive; "
                f"got {batch_size}, {max_len} and {num_pages}"
            )
        page_size *= 1 if parallel is None else parallel.seq
        pages_per_row = -(-max_len // page_size)
        total = batch_size * pages_per_row if num_pages is None else num_pages
        table = jnp.arange(batch_size * pages_per_row, dtype=jnp.int32)
        size = {"num_pages": total, "page_size": page_size}
        return cls(
            k_pages=empty_pages(config, **size, dtype=dtype, parallel=parallel),
            v_pages=empty_pages(config, **size, dtype=dtype, parallel=parallel),
            page_table=(table % total).reshape(batch_size, pages_per_row),
            lengths=jnp.zeros((batch_size,), jnp.int32),
        )

    @property
    def page_size(self) -> int:
        """Tokens per page, on all devices along `seq` together."""
        return self.k_pages[0].shape[2]

    @property
    def num_pages(self) -> int:
        """P, pages in the pool."""
        return self.k_pages[0].shape[0]

    @property
    def max_len(self) -> int:
        """Tokens that one row can hold."""
        return self.page_table.shape[1] * self.page_size

    def replace(self, **fields: Any) -> "PagedKVCache":
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **fields)

    def specs(self) -> "PagedKVCache":
        """How each array is divided over a mesh: pages by heads and slots, the rest is whole."""
        spec = partition_spec(PAGES, RULES)
        return jax.tree.map(lambda array: spec if array.ndim == 4 else PartitionSpec(), self)


def empty_pages(
    config: DecoderConfig,
    *,
    num_pages: int,
    page_size: int,
    dtype: Any,
    parallel: Parallel | None,
) -> tuple[jax.Array, ...]:
    """Pages of keys or of values, zeros, for every layer.

    Arguments as in `PagedKVCache.create`, but that `page_size` counts the tokens of a page on all
    devices together.
    """
    heads, device = config.num_kv_heads, None
    if parallel is not None:
        heads, device = parallel.size * parallel.heads.num_kv_heads, parallel.pages
    shape = (num_pages, heads, page_size, config.head_dim)
    return tuple(jnp.zeros(shape, dtype, device=device) for _ in range(config.num_layers))
