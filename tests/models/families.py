"""Tiny random models: one for every feature that a configuration can switch on."""

import functools

import jax.numpy as jnp
import numpy as np

from jaxinfer.models.config import DecoderConfig, RopeScaling
from jaxinfer.models.decoder import Decoder
from jaxinfer.models.weights import weight_shapes


def _llama(**overrides: object) -> DecoderConfig:
    fields = {"vocab_size": 97, "hidden_size": 48, "num_heads": 6, "num_kv_heads": 2,
              "head_dim": 16, "intermediate_size": 80} | overrides  # fmt: skip
    return DecoderConfig.tiny(**fields)


def _gemma3(**overrides: object) -> DecoderConfig:
    fields: dict[str, object] = {
        "family": "gemma3", "num_layers": 4, "num_heads": 4, "num_kv_heads": 1, "head_dim": 32,
        "rope_theta": 1e6, "local_rope_theta": 1e4, "sliding_window": 5,
        "local_layers": (True, True, False, True), "activation": "gelu_tanh", "qk_norm": True,
        "sandwich_norms": True, "embedding_scale": 48**0.5, "tie_embeddings": True,
        "rms_norm_eps": 1e-6,
    }  # fmt: skip
    return _llama(**fields | overrides)


def _scaled(rope_type: str, **fields: object) -> DecoderConfig:
    scaling = RopeScaling(
        **{"rope_type": rope_type, "factor": 4.0, "original_max_position_embeddings": 32}  # type: ignore[arg-type]
        | fields
    )
    return _llama(head_dim=32, rope_theta=500.0, rope_scaling=scaling)


CONFIGS: dict[str, DecoderConfig] = {
    "llama": _llama(),
    "llama-tied-mqa": _llama(tie_embeddings=True, num_kv_heads=1),
    "llama-mha": _llama(num_kv_heads=6),
    "llama-linear": _scaled("linear"),
    "llama-llama3": _scaled("llama3", low_freq_factor=1.0, high_freq_factor=4.0),
    "llama-yarn": _scaled("yarn", beta_fast=4.0, beta_slow=1.0),
    "llama-yarn-factor": _scaled("yarn", attention_factor=0.7),
    "mistral-window": _llama(sliding_window=4, local_layers=(True, True)),
    "qwen2": _llama(family="qwen2", qkv_bias=True, rope_theta=1e6),
    "qwen3": _llama(family="qwen3", qk_norm=True, head_dim=32),
    "gemma3": _gemma3(),
    "gemma3-linear": _gemma3(
        rope_scaling=RopeScaling(rope_type="linear", factor=8.0), attention_scale=0.21
    ),
    "gemma-softcaps": _gemma3(attention_softcap=2.0, final_softcap=1.5, qk_norm=False),
}


@functools.cache
def random_weights(name: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights by canonical name, float32; norms and biases are random too, unlike a fresh model."""
    return weights_of(CONFIGS[name], seed)


def weights_of(config: DecoderConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """The same for a shape that is not among `CONFIGS`."""
    rng = np.random.default_rng(seed)
    weights = {}
    for weight, shape in weight_shapes(config).items():
        if "norm" in weight:
            values = rng.uniform(0.5, 1.5, shape)
        else:
            fan_in = shape[1] if weight == "embed" else shape[0] if len(shape) == 2 else 1
            values = rng.normal(0, 1.5 * fan_in**-0.5, shape)
        weights[weight] = values.astype(np.float32)
    return weights


@functools.cache
def random_model(name: str) -> Decoder:
    """The decoder with `random_weights`, float32."""
    weights = random_weights(name)
    return Decoder.from_weights(CONFIGS[name], weights.__getitem__, dtype=jnp.float32)
