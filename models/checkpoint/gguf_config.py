"""The metadata of a GGUF file as a `DecoderConfig`."""

import dataclasses
import math
from typing import Any

import numpy as np

from jaxinfer.models.checkpoint.gguf_file import GGUFFile
from jaxinfer.models.checkpoint.gguf_quants import dequantize_rows
from jaxinfer.models.config import DecoderConfig, RopeScaling
from jaxinfer.models.errors import CheckpointError, UnsupportedModelError
from jaxinfer.models.rope import inverse_frequencies

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")


def config_from_gguf(file: GGUFFile, source: str) -> DecoderConfig:
    """Read the fields that decide a decoder's shape.

    Args:
        file: Of one of `ARCHITECTURES`.
        source: Its path, for messages.

    Raises:
        CheckpointError: a field is missing, or contradicts another.
        UnsupportedModelError: a variant that is not implemented.
    """
    try:
        return _build(file)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{source}: {error}") from None
    except (ArithmeticError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: {error}") from error


def _build(file: GGUFFile) -> DecoderConfig:
    arch = file.metadata["general.architecture"]

    def maybe(key: str, default: Any = None) -> Any:
        return file.metadata.get(f"{arch}.{key}", default)

    def need(key: str) -> Any:
        value = maybe(key)
        if value is None:
            raise CheckpointError(f"metadata {f'{arch}.{key}'!r} is missing")
        return value

    hidden, heads = int(need("embedding_length")), int(need("attention.head_count"))
    layers = int(need("block_count"))
    there = len({name.split(".")[1] for name in file.tensors if name.startswith("blk.")})
    if layers != there:  # before anything is made for each
        raise CheckpointError(
            f"metadata {f'{arch}.block_count'!r} is {layers}, but the file holds tensors of "
            f"{there} blocks"
        )
    embed = file.tensors.get("token_embd.weight")
    if embed is None:
        raise CheckpointError("tensor token_embd.weight is missing")
    if int(maybe("expert_count", 0)) > 0:
        raise UnsupportedModelError("mixtures of experts are not supported")
    head_dim = int(maybe("attention.key_length", hidden // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if (size := int(maybe(key, head_dim))) != head_dim:
            raise UnsupportedModelError(f"{key} = {size} other than the head dimension, {head_dim}")
    gemma = arch == "gemma3"
    window = maybe("attention.sliding_window") if gemma else None
    period = int(maybe("attention.sliding_window_pattern", 6))
    theta = float(maybe("rope.freq_base", 10_000.0))
    return DecoderConfig(
        family=arch,
        vocab_size=embed.shape[0],
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=int(maybe("attention.head_count_kv", heads)),
        head_dim=head_dim,
        intermediate_size=int(need("feed_forward_length")),
        max_position_embeddings=int(need("context_length")),
        rms_norm_eps=float(need("attention.layer_norm_rms_epsilon")),
        rope_theta=theta,
        rope_scaling=_factors(file, head_dim, theta) or _scaling(maybe),
        # Seldom in the metadata: one layer in six is global, the others rotate with base 1e4.
        local_rope_theta=float(maybe("rope.freq_base_swa", 10_000.0)) if gemma else None,
        sliding_window=None if window is None else int(window),
        local_layers=tuple((i + 1) % period != 0 for i in range(layers)) if window else (),
        activation="gelu_tanh" if gemma else "silu",
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        sandwich_norms=gemma,
        attention_softcap=maybe("attn_logit_softcapping"),
        final_softcap=maybe("final_logit_softcapping"),
        # The 27B model (62 layers) scales by D/N, which the metadata do not say.
        attention_scale=(hidden // heads) ** -0.5 if gemma and layers == 62 else None,
        embedding_scale=hidden**0.5 if gemma else 1.0,
        tie_embeddings="output.weight" not in file.tensors,
    )


def _scaling(maybe) -> RopeScaling | None:
    kind = maybe("rope.scaling.type")
    if kind in (None, "none"):
        return None
    if kind not in ("linear", "yarn"):
        raise UnsupportedModelError(
            f"rope scaling {kind!r} is not supported in GGUF files; supported: linear, yarn"
        )
    factor = float(maybe("rope.scaling.factor", 1.0))
    scaling = RopeScaling(
        rope_type=kind,
        factor=factor,
        original_max_position_embeddings=int(maybe("rope.scaling.original_context_length", 0)),
    )
    if kind == "linear":
        return scaling
    for key, neutral in (("ext_factor", 1.0), ("log_multiplier", 0.0)):
        if (value := float(maybe(f"rope.scaling.yarn_{key}", neutral))) != neutral:
            raise UnsupportedModelError(f"rope scaling with yarn_{key} = {value} is not supported")
    # A factor on the magnitude that the formula gives; Hugging Face's replaces it.
    extra = float(maybe("rope.scaling.yarn_attn_factor", maybe("rope.scaling.attn_factor", 1.0)))
    return dataclasses.replace(
        scaling,
        beta_fast=float(maybe("rope.scaling.yarn_beta_fast", scaling.beta_fast)),
        beta_slow=float(maybe("rope.scaling.yarn_beta_slow", scaling.beta_slow)),
        attention_factor=None if extra == 1 else extra * (0.1 * math.log(factor) + 1),
    )


def _factors(file: GGUFFile, head_dim: int, theta: float) -> RopeScaling | None:
    """Llama 3.1's scaling, stored as a divisor for every frequency instead of its parameters."""
    info = file.tensors.get("rope_freqs.weight")
    if info is None:
        return None
    raw = file.raw("rope_freqs.weight")
    stored = dequantize_rows(raw, info.kind, (raw.shape[0], info.shape[-1])).reshape(-1)
    # All Llama 3.1 to 3.3 models share these, but for the factor.
    scaling = RopeScaling(
        rope_type="llama3",
        factor=max(float(stored.max()), 1.0),
        original_max_position_embeddings=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    plain, _ = inverse_frequencies(head_dim, theta, None)
    scaled, _ = inverse_frequencies(head_dim, theta, scaling)
    expected = plain / scaled
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-3):
        raise UnsupportedModelError(
            "rope_freqs.weight does not hold the factors of Llama 3.1, the only ones supported"
        )
    return scaling
