"""Rotary position embedding: frequencies with their scalings, and the angles of a call."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinfer.models.config import DecoderConfig, RopeScaling


def inverse_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None
) -> tuple[np.ndarray, float]:
    """Angular frequency of every pair, and the factor on cos and sin.

    Args:
        head_dim: H.
        theta: Rotary base.
        scaling: Stretch for long contexts, or None.

    Returns:
        `[H/2]` float64 radians per token, and the magnitude (1 except for yarn).
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    plain = theta**-exponent
    if scaling is None:
        return plain, 1.0
    if scaling.rope_type == "linear":
        return plain / scaling.factor, 1.0
    if scaling.rope_type == "llama3":
        return _llama3(plain, scaling), 1.0
    return _yarn(plain, theta, head_dim, scaling)


def _llama3(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a ramp between."""
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return kept * plain + (1 - kept) * plain / scaling.factor


def _yarn(
    plain: np.ndarray, theta: float, head_dim: int, scaling: RopeScaling
) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al., 2023, section 3.2): interpolate by number of rotations in the context."""

    def dimension(rotations: float) -> float:
        context = scaling.original_max_position_embeddings
        return head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow)), head_dim - 1)
    high = high if high > low else low + 1e-3
    ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
    frequencies = ramp * plain / scaling.factor + (1 - ramp) * plain
    magnitude = scaling.attention_factor
    if magnitude is None:
        magnitude = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return frequencies, magnitude


def rope_angles(
    config: DecoderConfig, positions: Int[Array, "B T"], *, local: bool
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Cosines and sines for a call, computed once and shared by all layers of one kind.

    Args:
        config: The model's shape.
        positions: `[B, T]` int32 position of every token.
        local: For sliding-window layers, which may have their own base and no scaling.

    Returns:
        cos and sin, `[B, T, H/2]` float32.
    """
    if local and config.local_rope_theta is not None:
        theta, scaling = config.local_rope_theta, None
    else:
        theta, scaling = config.rope_theta, config.rope_scaling
    frequencies, magnitude = inverse_frequencies(config.head_dim, theta, scaling)
    angle = positions.astype(jnp.float32)[..., None] * jnp.asarray(frequencies, jnp.float32)
    magnitude = jnp.float32(magnitude)
    return jnp.cos(angle) * magnitude, jnp.sin(angle) * magnitude


def uses_local_rope(config: DecoderConfig) -> bool:
    """Whether some layers rotate with another base than the rest."""
    return config.local_rope_theta is not None and any(config.local_layers)
