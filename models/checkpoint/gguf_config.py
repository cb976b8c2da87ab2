"""The metadata of a GGUF file as a `DecoderConfig`."""

import dataclasses
import math
from typing import Any

import numpy as np

from jaxinfer.models.checkpoint.gguf_file import GGUFFile
from jaxinfer.models.checkpoint.gguf_quants import dequantize_rows
from jaxinfer.models.checkpoint.header_numbers import not_negative, positive, whole
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


class _Fields:
    """The metadata of one architecture, checked; without a default they must be there."""

    def __init__(self, metadata: dict[str, Any]):
        self.arch: str = metadata["general.architecture"]
        self._metadata = metadata

    def maybe(self, key: str) -> Any:
        return self._metadata.get(f"{self.arch}.{key}")

    def size(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        return whole(*self._named(key, default), least=least)

    def positive(self, key: str, default: float | None = None) -> float:
        return positive(*self._named(key, default))

    def not_negative(self, key: str, default: float | None = None) -> float:
        return not_negative(*self._named(key, default))

    def _named(self, key: str, default: Any) -> tuple[Any, str]:
        value = self.maybe(key)
        name = f"metadata {f'{self.arch}.{key}'!r}"
        if value is None and default is None:
            raise CheckpointError(f"{name} is missing")
        return default if value is None else value, name


def _build(file: GGUFFile) -> DecoderConfig:
    fields = _Fields(file.metadata)
    arch = fields.arch
    hidden, heads = fields.size("embedding_length"), fields.size("attention.head_count")
    layers = fields.size("block_count")
    there = len({name.split(".")[1] for name in file.tensors if name.startswith("blk.")})
    if layers != there:  # before anything is made for each
        raise CheckpointError(
            f"metadata {f'{arch}.block_count'!r} is {layers}, but the file holds tensors of "
            f"{there} blocks"
        )
    embed = file.tensors.get("token_embd.weight")
    if embed is None:
        raise CheckpointError("tensor token_embd.weight is missing")
    if fields.size("expert_count", 0, least=0) > 0:
        raise UnsupportedModelError("mixtures of experts are not supported")
    head_dim = fields.size("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (size := fields.size(key, head_dim)) != head_dim:
            raise UnsupportedModelError(f"{key} = {size} other than the head dimension, {head_dim}")
    gemma = arch == "gemma3"
    window = fields.size("attention.sliding_window", 0, least=0) if gemma else 0
    period = fields.size("attention.sliding_window_pattern", 6)
    theta = fields.positive("rope.freq_base", 10_000.0)
    return DecoderConfig(
        family=arch,
        vocab_size=embed.shape[0],
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=fields.size("attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate_size=fields.size("feed_forward_length"),
        max_position_embeddings=fields.size("context_length"),
        rms_norm_eps=fields.not_negative("attention.layer_norm_rms_epsilon"),
        rope_theta=theta,
        rope_scaling=_factors(file, head_dim, theta) or _scaling(fields),
        # Seldom in the metadata: one layer in six is global, the others rotate with base 1e4.
        local_rope_theta=fields.positive("rope.freq_base_swa", 10_000.0) if gemma else None,
        sliding_window=window or None,
        local_layers=tuple((i + 1) % period != 0 for i in range(layers)) if window else (),
        activation="gelu_tanh" if gemma else "silu",
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        sandwich_norms=gemma,
        attention_softcap=_softcap(fields, "attn_logit_softcapping"),
        final_softcap=_softcap(fields, "final_logit_softcapping"),
        # The 27B model (62 layers) scales by D/N, which the metadata do not say.
        attention_scale=(hidden // heads) ** -0.5 if gemma and layers == 62 else None,
        embedding_scale=hidden**0.5 if gemma else 1.0,
        tie_embeddings="output.weight" not in file.tensors,
    )


def _softcap(fields: _Fields, key: str) -> float | None:
    return None if fields.maybe(key) is None else fields.positive(key)


def _scaling(fields: _Fields) -> RopeScaling | None:
    kind = fields.maybe("rope.scaling.type")
    if kind in (None, "none"):
        return None
    if kind not in ("linear", "yarn"):
        raise UnsupportedModelError(
            f"rope scaling {kind!r} is not supported in GGUF files; supported: linear, yarn"
        )
    factor = fields.positive("rope.scaling.factor", 1.0)
    scaling = RopeScaling(
        rope_type=kind,
        factor=factor,
        original_max_position_embeddings=fields.size(
            "rope.scaling.original_context_length", 0, least=0
        ),
    )
    if kind == "linear":
        return scaling
    for key, neutral in (("ext_factor", 1.0), ("log_multiplier", 0.0)):
        if (value := fields.not_negative(f"rope.scaling.yarn_{key}", neutral)) != neutral:
            raise UnsupportedModelError(f"rope scaling with yarn_{key} = {value} is not supported")
    # A factor on the magnitude that the formula gives; Hugging Face's replaces it.
    older = fields.positive("rope.scaling.attn_factor", 1.0)
    extra = fields.positive("rope.scaling.yarn_attn_factor", older)
    return dataclasses.replace(
        scaling,
        beta_fast=fields.positive("rope.scaling.yarn_beta_fast", scaling.beta_fast),
        beta_slow=fields.positive("rope.scaling.yarn_beta_slow", scaling.beta_slow),
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
