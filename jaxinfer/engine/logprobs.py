"""Log-probabilities of chosen and of best tokens."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.models.decoder import Decoder
from jaxinfer.models.pytree import pytree
from jaxinfer.outputs import Logprob, TokenLogprobs

CHUNK = 256  # rows whose logits exist at once


@pytree
@dataclasses.dataclass(frozen=True, kw_only=True)
class StepLogprobs:
    """Of a batch of tokens; leading dimensions as the tokens have.

    Attributes:
        chosen: `[…]` float32 log-probability of the token.
        rank: `[…]` int32, 1 for the most probable.
        top: `[…, k]` float32, the k best.
        top_ids: `[…, k]` int32.
    """

    chosen: jax.Array
    rank: jax.Array
    top: jax.Array
    top_ids: jax.Array


def step_logprobs(logits: Float[Array, "B V"], tokens: Int[Array, "B"], count: int) -> StepLogprobs:
    """Log-probabilities of `tokens` and of the `count` best."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)
    rank = 1 + jnp.sum(logprobs > chosen, axis=-1, dtype=jnp.int32)
    top, ids = jax.lax.top_k(logprobs, count)
    return StepLogprobs(chosen=chosen[:, 0], rank=rank, top=top, top_ids=ids)


def prompt_logprobs(
    model: Decoder, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"], count: int
) -> StepLogprobs:
    """Log-probabilities of the tokens that follow each position of a chunk of prompts.

    Args:
        model: Turns hidden states into logits.
        hidden: `[B, T, D]`.
        targets: `[B, T]` int32, the next token of each position.
        count: Best tokens to report.

    Memory: logits of `CHUNK` positions at a time, never of all.
    """
    B, T, D = hidden.shape
    rows = B * T
    size = min(CHUNK, rows)
    padded = -(-rows // size) * size
    flat = jnp.pad(hidden.reshape(rows, D), ((0, padded - rows), (0, 0)))
    ids = jnp.pad(targets.reshape(rows), (0, padded - rows))

    def chunk(carry: tuple[jax.Array, jax.Array]) -> StepLogprobs:
        return step_logprobs(model.logits(carry[0]), carry[1], count)

    parts = jax.lax.map(chunk, (flat.reshape(-1, size, D), ids.reshape(-1, size)))

    def whole(part: jax.Array) -> jax.Array:
        return part.reshape(padded, *part.shape[2:])[:rows].reshape(B, T, *part.shape[2:])

    return jax.tree.map(whole, parts)


def to_dict(
    report: StepLogprobs,
    index: tuple[int, ...],
    token: int,
    wanted: int,
    describe: Callable[[int], str] | None,
) -> TokenLogprobs:
    """One token's report for people; `report` holds numpy arrays.

    Args:
        report: Of many tokens.
        index: Which of them.
        token: Its id.
        wanted: Best tokens asked for.
        describe: Text of a token id.
    """

    def entry(token: int, logprob: float, rank: int) -> Logprob:
        text = None if describe is None else describe(token)
        return Logprob(logprob=logprob, rank=rank, decoded_token=text)

    result = {token: entry(token, float(report.chosen[index]), int(report.rank[index]))}
    for place in range(wanted):
        best = int(report.top_ids[index][place])
        result.setdefault(best, entry(best, float(report.top[index][place]), place + 1))
    return result
