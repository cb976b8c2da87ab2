"""The compiled functions of the engine, and the state they keep on the device."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.engine.batch import Chunk, DecodeRow, DecodeState, PrefillInputs, StepResult
from jaxinfer.engine.buckets import Buckets, round_up
from jaxinfer.engine.logprobs import prompt_logprobs
from jaxinfer.engine.sampler import NOT_FINITE, sample
from jaxinfer.engine.sampling_state import Row, SamplingFlags, SamplingState, sampling_arrays
from jaxinfer.engine.sizing import decode_verdicts
from jaxinfer.models.cache import PagedKVCache, empty_pages
from jaxinfer.models.decoder import Decoder
from jaxinfer.models.functions import forward
from jaxinfer.pallas_kernels.dispatch import choices, force_all, logger, parse_forced
from jaxinfer.pallas_kernels.observe import observe

Pages = tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]


class Runner:
    """Runs a model on a pool of pages.

    Every call is dispatched without waiting for the device. The weights are flattened once, since
    walking a module tree takes longer than a small model's step.

    Where the model is divided over devices, each has its part of every page, and all of the rest:
    every device chooses the tokens, from the same scores by the same numbers.
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
        batch_invariant: bool = False,
        steps_per_program: int = 1,
    ):
        """Allocate the pool.

        Args:
            model: The decoder.
            num_pages: P.
            page_size: p.
            buckets: Shapes that calls are padded to.
            dtype: Of keys and values.
            implementation: As for `parse_forced`; None: the measured choice.
            batch_invariant: Decode with an attention that treats every row by itself: the Mosaic
                kernel cuts the keys of a row where the lengths of all rows say.
            steps_per_program: As in `EngineConfig`.
        """
        self.config, self._parallel = model.config, model.parallel
        self._weights, self._structure = jax.tree.flatten(model)
        self._num_pages, self._page_size, self._dtype = num_pages, page_size, dtype
        self._buckets, self._steps_per_program = buckets, steps_per_program
        self._forced, self._batch_invariant = parse_forced(implementation), batch_invariant
        self._warned = False
        if batch_invariant:
            self._forced = (*self._forced, ("xla", "decode_attention"))  # the last one wins
        self._wants_unified = any(layer.attention.softmax == "unified" for layer in model.layers)
        if self._wants_unified:
            self._foresee_online()
        self._pages: Pages = self._new_pages()
        self._state: DecodeState | None = None
        self.programs = 0  # traced so far, that is, compiled
        self._decoders: set[tuple[int, int, SamplingFlags]] = set()  # rows, table width, flags
        # What comes back goes in again, so it must not change its place.
        pages, self._whole = None, None
        if self._parallel is not None:
            pages, self._whole = self._parallel.pages, self._parallel.replicated
        self._decode = jax.jit(
            self._decode_steps,
            static_argnames="flags",
            donate_argnames=("pages", "state"),
            out_shardings=(pages, self._whole, self._whole),
        )
        self._prefill = jax.jit(
            self._prefill_chunk,
            static_argnames=("flags", "fresh", "prompt_top"),
            donate_argnames="pages",
            out_shardings=(pages, self._whole),
        )

    def reset_if_lost(self) -> None:
        """Make new pages if an interrupted or failed call has taken the old ones with it."""
        self._state = None
        try:
            # A call that failed on the device is noticed only where its results are used.
            jax.block_until_ready(self._pages)
            kept = [page for pages in self._pages for page in pages]
            lost = not kept or any(page.is_deleted() for page in kept)
        except RuntimeError:
            lost = True
        if lost:
            self._pages = ((), ())  # the old ones go before there are new ones
            self._pages = self._new_pages()

    def prefill(
        self,
        chunks: Sequence[Chunk],
        *,
        flags: SamplingFlags | None,
        prompt_top: int | None,
    ) -> StepResult:
        """Put chunks of prompts into the cache and choose the token after each.

        Args:
            chunks: Together at most `max_num_batched_tokens` when padded.
            flags: What the sampler needs; None: no token is chosen, since the prompt goes on.
            prompt_top: Report log-probabilities of the targets, and this many best tokens.
        """
        longest = max(len(chunk.tokens) for chunk in chunks)
        T = self._buckets.prefill_tokens(longest)
        B = self._buckets.prefill_rows(len(chunks), T)
        empty = [None] * (B - len(chunks))
        start = [chunk.start for chunk in chunks]
        arrays: dict[str, Any] = {
            "tokens": _padded([chunk.tokens for chunk in chunks], (B, T)),
            "start": _padded(start, (B,)),
            "count": _padded([len(chunk.tokens) for chunk in chunks], (B,)),
            "page_table": self._table([c.pages for c in chunks], B, self._buckets.prefill_width),
            "targets": None,
        }
        if prompt_top is not None:
            arrays["targets"] = _padded([chunk.targets or () for chunk in chunks], (B, T))
        sampling = None
        if flags is not None:
            sampling = self._sampling([*(chunk.row for chunk in chunks), *empty], flags)
        with force_all(self._forced):
            # Arrays of the host: the compiled call takes them over faster than `device_put` does.
            self._pages, result = self._prefill(
                self._weights, pages=self._pages, arrays=arrays, sampling=sampling, flags=flags,
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
            "page_table": self._table(tables, B, self._buckets.decode_width),
        }
        empty = [None] * (B - len(rows))
        sampling = self._sampling([*(row.row for row in rows), *empty], flags)
        arrays, sampling = jax.device_put((arrays, sampling), self._whole)
        self._state = DecodeState(**arrays, sampling=SamplingState(**sampling))

    def set_tables(self, tables: Sequence[Sequence[int]]) -> None:
        """Tell the rows about pages that they were given since."""
        assert self._state is not None, "set_rows comes first"
        rows = self._state.token.shape[0]
        table = self._table(tables, rows, self._buckets.decode_width)
        table = jax.device_put(table, self._whole)
        self._state = dataclasses.replace(self._state, page_table=table)

    def has_decoder(self, rows: int, pages: int, *, flags: SamplingFlags) -> bool:
        """Whether a step is compiled for so many rows (a bucket) of at most so many pages."""
        return (rows, self._buckets.decode_width(pages), flags) in self._decoders

    def decode(self, steps: int, *, flags: SamplingFlags) -> Iterator[StepResult]:
        """Advance every active row by so many tokens.

        Args:
            steps: Tokens of each row; a multiple of `steps_per_program`.
            flags: What the sampler needs.

        Yields:
            The result of each program, which is dispatched when it is asked for.
        """
        assert self._state is not None, "set_rows comes first"
        assert steps % self._steps_per_program == 0, "programs are whole"
        for _ in range(steps // self._steps_per_program):
            with force_all(self._forced):
                self._pages, self._state, result = self._decode(
                    self._weights, pages=self._pages, state=self._state, flags=flags
                )
            yield result

    def _decode_steps(
        self, weights: list[jax.Array], *, pages: Pages, state: DecodeState, flags: SamplingFlags
    ) -> tuple[Pages, DecodeState, StepResult]:
        self.programs += 1
        rows, width = state.page_table.shape
        self._decoders.add((rows, width, flags))
        step = functools.partial(self._decode_step, weights, flags)
        if self._steps_per_program == 1:
            return step(pages, state)

        def body(carry: tuple[Pages, DecodeState], _: None):
            pages, state, result = step(*carry)
            return (pages, state), result

        (pages, state), result = jax.lax.scan(
            body, (pages, state), None, length=self._steps_per_program
        )
        return pages, state, result

    def _decode_step(
        self, weights: list[jax.Array], flags: SamplingFlags, pages: Pages, state: DecodeState
    ) -> tuple[Pages, DecodeState, StepResult]:
        model: Decoder = jax.tree.unflatten(self._structure, weights)
        cache = PagedKVCache(
            k_pages=pages[0], v_pages=pages[1], page_table=state.page_table, lengths=state.lengths
        )
        took_part = state.active.astype(jnp.int32)
        found: list[jax.Array] = []
        with observe("decode_attention", lambda *, fallbacks: found.append(fallbacks)):
            hidden, cache = forward(model, state.token[:, None], cache, took_part)
        choice = choices().get("decode_attention")
        if not found and self._wants_unified and choice is not None:
            self._warn_of_online(choice.implementation, choice.passed_over)
        logits = model.logits(hidden[:, 0])
        tokens, sampling, logprobs = sample(logits, state.sampling, flags)
        stopped = jnp.any(tokens[:, None] == state.sampling.stop_ids, axis=1)
        budget = state.budget - took_part
        active = state.active & ~stopped & (budget > 0) & (tokens != NOT_FINITE)
        state = DecodeState(
            token=tokens,
            active=active,
            budget=budget,
            # An ended row stays in the batch for a while; with no keys it costs little.
            lengths=jnp.where(active, cache.lengths, 0),
            page_table=state.page_table,
            sampling=sampling,
        )
        result = StepResult(
            tokens=jnp.where(took_part > 0, tokens, -1),
            logprobs=logprobs,
            softmax_fallbacks=jnp.sum(jnp.stack(found)) if found else None,
        )
        return (cache.k_pages, cache.v_pages), state, result

    def _foresee_online(self) -> None:
        """Warn now if the unified softmax will not be run, not in the middle of an answer."""
        # Whether a kernel serves it depends neither on the rows of a step nor on their length.
        with force_all(self._forced):
            verdicts = decode_verdicts(
                self.config, self._page_size, self._dtype, rows=1, width=1, softmax="unified"
            )
        taken = next((verdict for verdict in verdicts if verdict.serves), None)
        if taken is not None and taken.implementation != "mosaic":
            passed_over = [verdict.reason for verdict in verdicts[: verdicts.index(taken)]]
            self._warn_of_online(taken.implementation, passed_over)

    def _warn_of_online(self, name: str, passed_over: Sequence[str]) -> None:
        """Say once that a unified softmax is asked for and not run, and why."""
        if self._warned:
            return
        self._warned, why = True, "it was asked for by name"
        if self._batch_invariant:
            why = "batch_invariant takes it"
        elif passed_over:
            why = "; ".join(passed_over)
        logger.warning("the unified softmax is not run: %s serves, which is online (%s)", name, why)

    def _prefill_chunk(
        self,
        weights: list[jax.Array],
        *,
        pages: Pages,
        arrays: dict[str, jax.Array],
        sampling: dict[str, jax.Array] | None,
        flags: SamplingFlags | None,
        fresh: bool,
        prompt_top: int | None,
    ) -> tuple[Pages, StepResult]:
        self.programs += 1
        model: Decoder = jax.tree.unflatten(self._structure, weights)
        inputs = PrefillInputs(**arrays)
        cache = PagedKVCache(
            k_pages=pages[0], v_pages=pages[1], page_table=inputs.page_table, lengths=inputs.start
        )
        hidden, cache = forward(model, inputs.tokens, cache, inputs.count, fresh=fresh)
        tokens, logprobs = jnp.full_like(inputs.count, -1), None
        if sampling is not None and flags is not None:
            last = jnp.maximum(inputs.count - 1, 0)[:, None, None]
            logits = model.logits(jnp.take_along_axis(hidden, last, axis=1)[:, 0])
            tokens, _, logprobs = sample(logits, SamplingState(**sampling), flags)
        of_prompt = None
        if prompt_top is not None:
            assert inputs.targets is not None
            of_prompt = prompt_logprobs(model, hidden, inputs.targets, prompt_top)
        result = StepResult(tokens=tokens, logprobs=logprobs, prompt_logprobs=of_prompt)
        return (cache.k_pages, cache.v_pages), result

    def _new_pages(self) -> Pages:
        def pool() -> tuple[jax.Array, ...]:
            return empty_pages(
                self.config, num_pages=self._num_pages, page_size=self._page_size,
                dtype=self._dtype, parallel=self._parallel,
            )  # fmt: skip

        return pool(), pool()

    def _table(
        self, tables: Sequence[Sequence[int]], rows: int, width: Callable[[int], int]
    ) -> np.ndarray:
        longest = max((len(pages) for pages in tables), default=1)
        return _padded(tables, (rows, width(longest)))

    def _sampling(self, rows: Sequence[Row | None], flags: SamplingFlags) -> dict[str, Any]:
        stop = max((len(row.stop_ids) for row in rows if row is not None), default=0)
        return sampling_arrays(
            rows,
            vocab_size=self.config.vocab_size,
            stop_width=round_up(stop, lowest=8, highest=2**31),
            penalties=flags.penalties,
        )


def _padded(values: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Numbers, or lists of numbers, in an int32 array of zeros."""
    array = np.zeros(shape, np.int32)
    if len(shape) == 1:
        array[: len(values)] = values
    else:
        for i, row in enumerate(values):
            array[i, : len(row)] = row
    return array
