"""The compiled functions of the engine, and the state they keep on the device."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.engine.buckets import Buckets, round_up
from jaxinfer.engine.logprobs import StepLogprobs, prompt_logprobs
from jaxinfer.engine.sampler import sample
from jaxinfer.engine.sampling_state import Row, SamplingFlags, SamplingState, build_state
from jaxinfer.models.cache import PagedKVCache
from jaxinfer.models.decoder import Decoder
from jaxinfer.models.functions import forward
from jaxinfer.models.pytree import pytree
from jaxinfer.pallas_kernels.dispatch import force_implementation

Pages = tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]


@pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeState:
    """Rows that decode together.

    Attributes:
        token: `[B]` int32, latest token of each row, not yet in the cache.
        active: `[B]` bool, rows that take part.
        budget: `[B]` int32, tokens a row may still get.
        lengths: `[B]` int32, tokens in the cache.
        page_table: `[B, M]` int32.
        sampling: Parameters and progress of the sampler.
    """

    token: jax.Array
    active: jax.Array
    budget: jax.Array
    lengths: jax.Array
    page_table: jax.Array
    sampling: SamplingState


@pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillInputs:
    """Chunks of prompts that are computed together.

    Attributes:
        tokens: `[B, T]` int32, padded on the right.
        targets: `[B, T]` int32, the token after each, or None where nobody asks.
        start: `[B]` int32, tokens already in the cache.
        count: `[B]` int32, real tokens among the T.
        page_table: `[B, M]` int32.
        sampling: Parameters of the sampler.
    """

    tokens: jax.Array
    targets: jax.Array | None
    start: jax.Array
    count: jax.Array
    page_table: jax.Array
    sampling: SamplingState


@pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class StepResult:
    """What the host needs to know of one call; arrays on the device until fetched.

    Attributes:
        tokens: `[B]` int32 chosen tokens; -1 for rows that took no part.
        logprobs: Of the chosen tokens, or None.
        prompt_logprobs: `[B, T]` of the targets, or None.
    """

    tokens: jax.Array
    logprobs: StepLogprobs | None = None
    prompt_logprobs: StepLogprobs | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A part of one sequence to prefill.

    Attributes:
        tokens: Its tokens.
        targets: The token after each, or None.
        start: Tokens of the sequence already in the cache.
        pages: The sequence's pages.
        row: The request as the sampler sees it.
    """

    tokens: Sequence[int]
    targets: Sequence[int] | None
    start: int
    pages: Sequence[int]
    row: Row


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DecodeRow:
    """One sequence that decodes.

    Attributes:
        token: Its latest token.
        length: Tokens in the cache.
        budget: Tokens it may still get.
        row: The request as the sampler sees it.
    """

    token: int
    length: int
    budget: int
    row: Row


class Runner:
    """Runs a model on a pool of pages.

    Every call is dispatched without waiting for the device. The weights are flattened once, since
    walking a module tree takes longer than a small model's step.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        num_pages: int,
        page_size: int,
        buckets: Buckets,
        dtype: Any,
        implementation: str | None = None,
    ):
        """Allocate the pool.

        Args:
            model: The decoder.
            num_pages: P.
            page_size: p.
            buckets: Shapes that calls are padded to.
            dtype: Of keys and values.
            implementation: Of every op that has it; None: the measured choice.
        """
        self.config = model.config
        self._weights, self._structure = jax.tree.flatten(model)
        self._num_pages, self._page_size, self._dtype = num_pages, page_size, dtype
        self._buckets, self._implementation = buckets, implementation
        self._pages = self._new_pages()
        self._state: DecodeState | None = None
        self.programs = 0  # traced so far, that is, compiled
        self._decode = jax.jit(
            self._decode_step, static_argnames="flags", donate_argnames=("pages", "state")
        )
        self._prefill = jax.jit(
            self._prefill_chunk,
            static_argnames=("flags", "fresh", "prompt_top"),
            donate_argnames="pages",
        )

    def reset_if_lost(self) -> None:
        """Make new pages if an interrupted call has taken the old ones with it."""
        if any(page.is_deleted() for pages in self._pages for page in pages):
            self._pages = self._new_pages()
        self._state = None

    def prefill(
        self, chunks: Sequence[Chunk], *, flags: SamplingFlags, prompt_top: int | None
    ) -> StepResult:
        """Put chunks of prompts into the cache and choose the token after each.

        Args:
            chunks: Together at most `max_num_batched_tokens` when padded.
            flags: What the sampler needs.
            prompt_top: Report log-probabilities of the targets, and this many best tokens.
        """
        longest = max(len(chunk.tokens) for chunk in chunks)
        T = self._buckets.prefill_tokens(longest)
        B = self._buckets.prefill_rows(len(chunks), T)
        empty = [None] * (B - len(chunks))
        start = [chunk.start for chunk in chunks]
        arrays = {
            "tokens": _padded([chunk.tokens for chunk in chunks], (B, T)),
            "start": _padded(start, (B,)),
            "count": _padded([len(chunk.tokens) for chunk in chunks], (B,)),
            "page_table": self._table([chunk.pages for chunk in chunks], B),
        }
        if prompt_top is not None:
            arrays["targets"] = _padded([chunk.targets or () for chunk in chunks], (B, T))
        sampling = self._sampling([*(chunk.row for chunk in chunks), *empty], flags)
        inputs = PrefillInputs(
            **{"targets": None} | dict(jax.device_put(arrays)), sampling=sampling
        )
        with self._forced():
            self._pages, result = self._prefill(
                self._weights, pages=self._pages, inputs=inputs, flags=flags,
                fresh=not any(start), prompt_top=prompt_top,
            )  # fmt: skip
        return result

    def set_rows(
        self, rows: Sequence[DecodeRow], tables: Sequence[Sequence[int]], *, flags: SamplingFlags
    ) -> None:
        """Decide which sequences `decode` advances.

        Args:
            rows: The sequences.
            tables: The pages of each.
            flags: What the sampler needs.
        """
        B = self._buckets.rows(len(rows))
        arrays = {
            "token": _padded([row.token for row in rows], (B,)),
            "active": np.arange(B) < len(rows),
            "budget": _padded([row.budget for row in rows], (B,)),
            "lengths": _padded([row.length for row in rows], (B,)),
            "page_table": self._table(tables, B),
        }
        empty = [None] * (B - len(rows))
        sampling = self._sampling([*(row.row for row in rows), *empty], flags)
        self._state = DecodeState(**jax.device_put(arrays), sampling=sampling)

    def set_tables(self, tables: Sequence[Sequence[int]]) -> None:
        """Tell the rows about pages that they were given since."""
        assert self._state is not None, "set_rows comes first"
        table = self._table(tables, self._state.token.shape[0])
        self._state = dataclasses.replace(self._state, page_table=jax.device_put(table))

    def decode(self, *, flags: SamplingFlags) -> StepResult:
        """Advance every active row by one token."""
        assert self._state is not None, "set_rows comes first"
        with self._forced():
            self._pages, self._state, result = self._decode(
                self._weights, pages=self._pages, state=self._state, flags=flags
            )
        return result

    def _decode_step(
        self, weights: list[jax.Array], *, pages: Pages, state: DecodeState, flags: SamplingFlags
    ) -> tuple[Pages, DecodeState, StepResult]:
        self.programs += 1
        model: Decoder = jax.tree.unflatten(self._structure, weights)
        cache = PagedKVCache(
            k_pages=pages[0], v_pages=pages[1], page_table=state.page_table, lengths=state.lengths
        )
        took_part = state.active.astype(jnp.int32)
        hidden, cache = forward(model, state.token[:, None], cache, took_part)
        logits = model.logits(hidden[:, 0])
        tokens, sampling, logprobs = sample(logits, state.sampling, flags)
        stopped = jnp.any(tokens[:, None] == state.sampling.stop_ids, axis=1)
        budget = state.budget - took_part
        state = DecodeState(
            token=tokens,
            active=state.active & ~stopped & (budget > 0),
            budget=budget,
            lengths=cache.lengths,
            page_table=state.page_table,
            sampling=sampling,
        )
        result = StepResult(tokens=jnp.where(took_part > 0, tokens, -1), logprobs=logprobs)
        return (cache.k_pages, cache.v_pages), state, result

    def _prefill_chunk(
        self,
        weights: list[jax.Array],
        *,
        pages: Pages,
        inputs: PrefillInputs,
        flags: SamplingFlags,
        fresh: bool,
        prompt_top: int | None,
    ) -> tuple[Pages, StepResult]:
        self.programs += 1
        model: Decoder = jax.tree.unflatten(self._structure, weights)
        cache = PagedKVCache(
            k_pages=pages[0], v_pages=pages[1], page_table=inputs.page_table, lengths=inputs.start
        )
        hidden, cache = forward(model, inputs.tokens, cache, inputs.count, fresh=fresh)
        last = jnp.maximum(inputs.count - 1, 0)[:, None, None]
        logits = model.logits(jnp.take_along_axis(hidden, last, axis=1)[:, 0])
        tokens, _, logprobs = sample(logits, inputs.sampling, flags)
        of_prompt = None
        if prompt_top is not None:
            assert inputs.targets is not None
            of_prompt = prompt_logprobs(model, hidden, inputs.targets, prompt_top)
        result = StepResult(tokens=tokens, logprobs=logprobs, prompt_logprobs=of_prompt)
        return (cache.k_pages, cache.v_pages), result

    def _new_pages(self) -> Pages:
        config = self.config
        shape = (self._num_pages, config.num_kv_heads, self._page_size, config.head_dim)

        def pool() -> tuple[jax.Array, ...]:
            return tuple(jnp.zeros(shape, self._dtype) for _ in range(config.num_layers))

        return pool(), pool()

    def _table(self, tables: Sequence[Sequence[int]], rows: int) -> np.ndarray:
        width = self._buckets.width(max((len(pages) for pages in tables), default=1))
        return _padded(tables, (rows, width))

    def _sampling(self, rows: Sequence[Row | None], flags: SamplingFlags) -> SamplingState:
        stop = max((len(row.stop_ids) for row in rows if row is not None), default=0)
        return build_state(
            rows,
            vocab_size=self.config.vocab_size,
            stop_width=round_up(stop, lowest=8, highest=2**31),
            penalties=flags.penalties,
        )

    def _forced(self) -> contextlib.AbstractContextManager[None]:
        if self._implementation is None:
            return contextlib.nullcontext()
        return force_implementation(self._implementation)


def _padded(values: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Numbers, or lists of numbers, in an int32 array of zeros."""
    array = np.zeros(shape, np.int32)
    if len(shape) == 1:
        array[: len(values)] = values
    else:
        for i, row in enumerate(values):
            array[i, : len(row)] = row
    return array
