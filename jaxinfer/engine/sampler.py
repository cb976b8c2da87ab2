"""From scores to tokens, on the device."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.engine.logprobs import StepLogprobs, step_logprobs
from jaxinfer.engine.sampling_state import SamplingFlags, SamplingState

NOT_FINITE = -2  # in place of a token: the row's scores are NaN or infinite


def sample(
    logits: Float[Array, "B V"], state: SamplingState, flags: SamplingFlags
) -> tuple[Int[Array, "B"], SamplingState, StepLogprobs | None]:
    """Choose a token for every row.

    A row's token depends on its own logits, parameters, key and answer length only, never on its
    place in the batch or on other rows.

    Args:
        logits: `[B, V]` float32 scores.
        state: Parameters of the rows.
        flags: Static; what any row needs. Rows that do not need it are unaffected.

    Returns:
        `[B]` int32 tokens, the state after them, and log-probabilities if asked for. `NOT_FINITE`
        stands for a token where the best score is no number, which that of any NaN is not.
    """
    scores = logits
    if flags.penalties:
        scores = penalise(scores, state)
    if flags.min_tokens:
        scores = forbid_stop(scores, state)
    tokens = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    # The arg max of a row with a NaN is a NaN: one number per row tells of all.
    finite = jnp.isfinite(jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0])
    if flags.random:
        greedy = state.temperature == 0
        # From the best one down: a quotient that overflows is then that of a token never drawn.
        below = scores - jnp.max(scores, axis=-1, keepdims=True)
        scaled = below / jnp.where(greedy, 1.0, state.temperature)[:, None]
        if flags.filters:
            scaled = jnp.where(scaled >= lowest_kept(scaled, state)[:, None], scaled, -jnp.inf)
        # Gumbel-max: the arg max of scores plus Gumbel noise is a draw from their softmax.
        drawn = jnp.argmax(scaled + _noise(state, scaled.shape[1]), axis=-1).astype(jnp.int32)
        tokens = jnp.where(greedy, tokens, drawn)
    report = None if flags.logprobs is None else step_logprobs(logits, tokens, flags.logprobs)
    state = dataclasses.replace(state, index=state.index + 1)
    if flags.penalties and state.counts is not None:
        rows = jnp.arange(tokens.shape[0])
        state = dataclasses.replace(state, counts=state.counts.at[rows, tokens].add(1))
    return jnp.where(finite, tokens, NOT_FINITE), state, report


def penalise(scores: Float[Array, "B V"], state: SamplingState) -> Float[Array, "B V"]:
    """Repetition penalty over prompt and answer; presence and frequency over the answer."""
    assert state.counts is not None
    assert state.in_prompt is not None
    counts = state.counts.astype(jnp.float32)
    seen = (counts > 0) | state.in_prompt
    factor = jnp.where(seen, state.repetition[:, None], 1.0)
    scores = jnp.where(scores > 0, scores / factor, scores * factor)
    scores = scores - state.frequency[:, None] * counts
    return scores - state.presence[:, None] * (counts > 0)


def forbid_stop(scores: Float[Array, "B V"], state: SamplingState) -> Float[Array, "B V"]:
    """Rule out stop tokens where the answer is too short for them."""
    early = (state.index < state.floor)[:, None] & (state.stop_ids >= 0)
    stop = jnp.where(early, state.stop_ids, scores.shape[1])
    rows = jnp.arange(scores.shape[0])[:, None]
    return scores.at[rows, stop].set(-jnp.inf, mode="drop")


def lowest_kept(scores: Float[Array, "B V"], state: SamplingState) -> Float[Array, "B"]:
    """The score that a token must reach to pass min-p, then top-k, then top-p.

    Each counts only what those before it left, so that top-p is a share of the rest. Tokens tied
    with the last one kept are kept too.
    """
    V = scores.shape[1]
    ordered = -jnp.sort(-scores, axis=-1)
    rank = jnp.arange(V, dtype=jnp.int32)
    # p_i >= min_p · p_max, in logarithms.
    likely = ordered >= (ordered[:, 0] + jnp.log(state.min_p))[:, None]
    k = jnp.where(state.top_k > 0, state.top_k, V)
    left = likely & (rank < k[:, None])
    probability = jax.nn.softmax(jnp.where(left, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # The first token always passes; a later one if those before it do not suffice. Their sum may
    # round to 1 long before the last, which must not matter where nothing is to be cut.
    top_p = jnp.where(state.top_p < 1, state.top_p, jnp.inf)
    passes = left & ((before < top_p[:, None]) | (rank == 0))
    return jnp.min(jnp.where(passes, ordered, jnp.inf), axis=-1)


def _noise(state: SamplingState, vocab_size: int) -> Float[Array, "B V"]:
    def row(key: jax.Array, index: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(key, impl="threefry2x32")
        return jax.random.gumbel(jax.random.fold_in(key, index), (vocab_size,), jnp.float32)

    return jax.vmap(row)(state.key, state.index)
