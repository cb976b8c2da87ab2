"""What the sampler knows of every row of a batch, on the device."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.engine.buckets import round_up
from jaxinfer.models.pytree import pytree
from jaxinfer.sampling_params import MAX_LOGPROBS, SamplingParams


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SamplingFlags:
    """What a batch asks of the sampler; static, so that nothing unused is computed.

    Attributes:
        random: Some row draws random numbers.
        filters: Some row uses top-k, top-p or min-p, which sorts the vocabulary.
        penalties: Some row penalises earlier tokens.
        min_tokens: Some row may not stop yet.
        logprobs: Best tokens to report: None, 0, 5 or 20.
    """

    random: bool = False
    filters: bool = False
    penalties: bool = False
    min_tokens: bool = False
    logprobs: int | None = None

    @classmethod
    def of(cls, params: Sequence[SamplingParams], *, min_tokens: bool = False) -> "SamplingFlags":
        """The flags that serve all of these requests."""
        return cls(
            random=any(not p.is_greedy for p in params),
            filters=any(p.has_filters for p in params),
            penalties=any(p.has_penalties for p in params),
            min_tokens=min_tokens,
            logprobs=logprob_bucket(max((-1 if p.logprobs is None else p.logprobs) for p in params))
            if params
            else None,
        )


def logprob_bucket(wanted: int) -> int | None:
    """How many best tokens a compiled function reports for `wanted` (-1: none asked)."""
    if wanted < 0:
        return None
    return next(size for size in (0, 5, MAX_LOGPROBS) if size >= wanted)


@pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingState:
    """Parameters and progress of B rows.

    Attributes:
        temperature: `[B]` float32, 0 where the best token is taken.
        top_k: `[B]` int32, 0 for all.
        top_p: `[B]` float32.
        min_p: `[B]` float32.
        presence: `[B]` float32.
        frequency: `[B]` float32.
        repetition: `[B]` float32.
        key: `[B, 2]` uint32, random key of the request.
        index: `[B]` int32, tokens of the answer so far: the random numbers' counter.
        floor: `[B]` int32, answer length below which stop tokens are ruled out.
        stop_ids: `[B, S]` int32, tokens that end the answer; -1 where there are fewer.
        counts: `[B, V]` int32 occurrences in the answer, or None without penalties.
        in_prompt: `[B, V]` bool, tokens of the prompt, or None without penalties.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    presence: jax.Array
    frequency: jax.Array
    repetition: jax.Array
    key: jax.Array
    index: jax.Array
    floor: jax.Array
    stop_ids: jax.Array
    counts: jax.Array | None = None
    in_prompt: jax.Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One request as the sampler sees it.

    Attributes:
        params: Its parameters.
        key: Two 32-bit numbers.
        stop_ids: Tokens that end it.
        prompt_ids: Its prompt.
        output_ids: Its answer so far.
    """

    params: SamplingParams
    key: tuple[int, int]
    stop_ids: tuple[int, ...]
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]


def sampling_arrays(
    rows: Sequence[Row | None], *, vocab_size: int, stop_width: int, penalties: bool
) -> dict[str, Any]:
    """The fields of `SamplingState`, still on the host but for `counts` and `in_prompt`.

    Args:
        rows: One per row of the batch; None is an empty row.
        vocab_size: V.
        stop_width: S; no row may have more stop tokens.
        penalties: Count earlier tokens.
    """
    idle = SamplingParams(temperature=0.0)
    params = [idle if row is None else row.params for row in rows]

    def floats(name: str) -> np.ndarray:
        return np.asarray([getattr(p, name) for p in params], np.float32)

    temperature = [0.0 if p.is_greedy else p.temperature for p in params]
    stop = np.full((len(rows), stop_width), -1, np.int32)
    for i, row in enumerate(rows):
        if row is not None:
            stop[i, : len(row.stop_ids)] = row.stop_ids
    arrays: dict[str, Any] = {
        "temperature": np.asarray(temperature, np.float32),
        "top_k": np.asarray([min(p.top_k, vocab_size) for p in params], np.int32),
        "top_p": floats("top_p"),
        "min_p": floats("min_p"),
        "presence": floats("presence_penalty"),
        "frequency": floats("frequency_penalty"),
        "repetition": floats("repetition_penalty"),
        "key": np.asarray([(0, 0) if r is None else r.key for r in rows], np.uint32),
        "index": np.asarray([0 if r is None else len(r.output_ids) for r in rows], np.int32),
        "floor": np.asarray([p.min_tokens for p in params], np.int32),
        "stop_ids": stop,
    }
    if not penalties:
        return arrays
    prompt = _padded([[] if r is None else r.prompt_ids for r in rows])
    output = _padded([[] if r is None else r.output_ids for r in rows])
    arrays["counts"] = _count(output, vocab_size=vocab_size)
    arrays["in_prompt"] = _count(prompt, vocab_size=vocab_size) > 0
    return arrays


def _padded(sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """Token ids `[B, L]`, -1 behind the end; L is a bucket."""
    longest = max(len(s) for s in sequences)
    ids = np.full((len(sequences), round_up(longest, lowest=64, highest=2**31)), -1, np.int32)
    for i, sequence in enumerate(sequences):
        ids[i, : len(sequence)] = sequence
    return ids


@jax.jit(static_argnames="vocab_size")
def _count(ids: jax.Array, *, vocab_size: int) -> jax.Array:
    rows = jnp.arange(ids.shape[0])[:, None]
    # A negative index would count from the end; this one is out of range and dropped.
    ids = jnp.where(ids < 0, vocab_size, ids)
    return jnp.zeros((ids.shape[0], vocab_size), jnp.int32).at[rows, ids].add(1, mode="drop")
