"""Merging attention over disjoint sets of keys."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float


def merge_attention(
    parts: Sequence[tuple[Float[Array, "*B H"], Float[Array, "*B"]]],
) -> tuple[Float[Array, "*B H"], Float[Array, "*B"]]:
    """Combine `(output, lse)` pairs over disjoint keys into that of their union.

    Everything that splits keys goes through here: prefix and chunk, splits, shards, ring steps.
    A part without any visible key has lse = -inf and weight 0; if all have, the result is zeros
    and -inf.

    Args:
        parts: Outputs of any float dtype with natural-log log-sum-exps, float32.

    Returns:
        Output in the first part's dtype, lse in float32.

    Raises:
        ValueError: no parts.

    >>> one = (jnp.ones((2, 4)), jnp.zeros((2,)))
    >>> merge_attention([one, one])[1]
    Array([0.6931472, 0.6931472], dtype=float32)
    """
    if not parts:
        raise ValueError("merge_attention needs at least one (output, lse) pair; got none")
    lses = jnp.stack([lse.astype(jnp.float32) for _, lse in parts])
    peak = lses.max(axis=0)
    peak = jnp.where(jnp.isinf(peak), 0.0, peak)
    weights = jnp.exp(lses - peak)
    total = weights.sum(axis=0)
    seen = total > 0
    safe = jnp.where(seen, total, 1.0)
    out = sum(
        part.astype(jnp.float32) * (weight / safe)[..., None]
        for (part, _), weight in zip(parts, weights, strict=True)
    )
    lse = jnp.where(seen, peak + jnp.log(safe), -jnp.inf)
    return jnp.asarray(out).astype(parts[0][0].dtype), lse
