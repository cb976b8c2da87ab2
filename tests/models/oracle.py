"""A decoder in numpy float64, written to be read; nothing of the library is used but the config.

It has no cache, no batch and no pages: `[T]` tokens in, `[T, V]` logits out. Weights are those of
`models.weights`, matrices `[in, out]`.
"""

import math
from collections.abc import Mapping

import numpy as np

from jaxinfer.models.config import DecoderConfig, RopeScaling

Weights = Mapping[str, np.ndarray]


def decoder_logits(config: DecoderConfig, weights: Weights, tokens: list[int]) -> np.ndarray:
    """Logits after every token, `[T, V]` float64."""
    w = {name: np.asarray(array, np.float64) for name, array in weights.items()}
    eps = config.rms_norm_eps
    x = w["embed"][tokens] * config.embedding_scale  # [T, D]
    for layer in range(config.num_layers):
        part = {n.split(".")[2]: a for n, a in w.items() if n.startswith(f"layers.{layer}.")}

        out = _attention(config, layer, part, rms_norm(x, part["attn_norm"], eps))
        if config.sandwich_norms:
            out = rms_norm(out, part["post_attn_norm"], eps)
        x = x + out

        out = _feed_forward(config, part, rms_norm(x, part["mlp_norm"], eps))
        if config.sandwich_norms:
            out = rms_norm(out, part["post_mlp_norm"], eps)
        x = x + out
    x = rms_norm(x, w["final_norm"], eps)
    scores = x @ (w["embed"].T if config.tie_embeddings else w["lm_head"])
    return soft_cap(scores, config.final_softcap)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x²) + eps) · weight over the last axis."""
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def soft_cap(scores: np.ndarray, cap: float | None) -> np.ndarray:
    """c·tanh(s / c), or s."""
    return scores if cap is None else cap * np.tanh(scores / cap)


def _feed_forward(config: DecoderConfig, w: Weights, x: np.ndarray) -> np.ndarray:
    gate, up = x @ w["gate_proj"], x @ w["up_proj"]
    if config.activation == "silu":
        gate = gate / (1 + np.exp(-gate))
    else:
        inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        gate = 0.5 * gate * (1 + np.tanh(inner))
    return (gate * up) @ w["down_proj"]


def _attention(config: DecoderConfig, layer: int, w: Weights, x: np.ndarray) -> np.ndarray:
    T, H = len(x), config.head_dim
    local = bool(config.local_layers) and config.local_layers[layer]
    q, k, v = x @ w["q_proj"], x @ w["k_proj"], x @ w["v_proj"]
    if config.qkv_bias:
        q, k, v = q + w["q_bias"], k + w["k_bias"], v + w["v_bias"]
    q, k, v = (a.reshape(T, -1, H) for a in (q, k, v))
    if config.qk_norm:
        q = rms_norm(q, w["q_norm"], config.rms_norm_eps)
        k = rms_norm(k, w["k_norm"], config.rms_norm_eps)
    q, k = rotate(config, q, local=local), rotate(config, k, local=local)

    scale = H**-0.5 if config.attention_scale is None else config.attention_scale
    heads_per_kv = config.num_heads // config.num_kv_heads
    out = np.empty((T, config.num_heads, H))
    for head in range(config.num_heads):
        kv = head // heads_per_kv
        for t in range(T):
            first = max(0, t + 1 - config.sliding_window) if local and config.sliding_window else 0
            seen = slice(first, t + 1)
            scores = soft_cap(k[seen, kv] @ q[t, head] * scale, config.attention_softcap)
            weight = np.exp(scores - scores.max())
            out[t, head] = weight / weight.sum() @ v[seen, kv]
    return out.reshape(T, -1) @ w["o_proj"]


def rotate(config: DecoderConfig, x: np.ndarray, *, local: bool) -> np.ndarray:
    """Rotary position embedding of `[T, heads, H]`: pairs (i, i + H/2) as complex numbers."""
    own_base = local and config.local_rope_theta is not None
    theta = config.local_rope_theta if own_base else config.rope_theta
    assert theta is not None
    scaling = None if own_base else config.rope_scaling
    half = config.head_dim // 2
    frequencies = np.array([frequency(i, config.head_dim, theta, scaling) for i in range(half)])
    turn = np.exp(1j * np.arange(len(x))[:, None] * frequencies)[:, None]  # [T, 1, H/2]
    pairs = (x[..., :half] + 1j * x[..., half:]) * turn * magnitude(scaling)
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


def magnitude(scaling: RopeScaling | None) -> float:
    if scaling is None or scaling.rope_type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1.0  # YaRN, equation 22


def frequency(i: int, head_dim: int, theta: float, scaling: RopeScaling | None) -> float:
    """Radians per token of pair i."""
    plain = theta ** (-2 * i / head_dim)
    if scaling is None:
        return plain
    stretched = plain / scaling.factor
    if scaling.rope_type == "linear":
        return stretched
    context = scaling.original_max_position_embeddings
    if scaling.rope_type == "llama3":
        wavelength = 2 * math.pi / plain
        longest_kept = context / scaling.high_freq_factor
        shortest_stretched = context / scaling.low_freq_factor
        if wavelength < longest_kept:
            return plain
        if wavelength > shortest_stretched:
            return stretched
        smooth = (context / wavelength - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        return (1 - smooth) * stretched + smooth * plain

    # YaRN, section 3.2: pairs that turn often are kept, those that turn seldom are stretched.
    def pair_that_turns(times: float) -> float:
        return head_dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(scaling.beta_slow)), head_dim - 1)
    ramp = min(max((i - first) / max(last - first, 0.001), 0.0), 1.0)
    return plain * (1 - ramp) + stretched * ramp
