"""Hugging Face's `config.json` as a `DecoderConfig`."""

from typing import Any, Literal

from jaxinfer.models.checkpoint.header_numbers import not_negative, positive, whole
from jaxinfer.models.config import ROPE_TYPES, DecoderConfig, RopeScaling
from jaxinfer.models.errors import CheckpointError, UnsupportedModelError

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma3ForCausalLM": "gemma3",
    # Its decoder; pictures are not read.
    "Gemma3ForConditionalGeneration": "gemma3",
}
_MOST_LAYERS = 10_000  # far more than any model has
# What Gemma 3's files leave out when it has the value of the published configuration class.
_GEMMA3_DEFAULTS = {
    "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216,
    "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "max_position_embeddings": 131_072, "query_pre_attn_scalar": 256, "sliding_window": 4096,
}  # fmt: skip


def config_from_huggingface(values: dict[str, Any], source: str) -> DecoderConfig:
    """Read the fields that decide a decoder's shape.

    Args:
        values: Parsed `config.json`.
        source: Its path, for messages.

    Raises:
        UnsupportedModelError: an architecture or RoPE type that is not implemented.
        CheckpointError: a field is missing or contradicts another.
    """
    named = values.get("architectures") or ["(none)"]
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise CheckpointError(f"{source}: architectures must be a list of names; got {named!r:.80}")
    architecture = named[0]
    family = FAMILIES.get(architecture)
    if family is None:
        raise UnsupportedModelError(
            f"{source}: architecture {architecture!r} is not supported; "
            f"supported: {', '.join(sorted(FAMILIES))}"
        )
    if quantization := values.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise UnsupportedModelError(
            f"{source}: quantised weights ({method}) are not supported in this format; "
            "supported: float32, float16, bfloat16"
        )
    nested = values.get("text_config")
    if isinstance(nested, dict):  # a decoder within a larger model
        values = values | nested
    if family == "gemma3":
        values = _GEMMA3_DEFAULTS | values
    try:
        return _build(values, family, source)
    except KeyError as error:
        raise CheckpointError(f"{source}: field {error} is missing") from error
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{source}: {error}") from error


def _build(values: dict[str, Any], family: str, source: str) -> DecoderConfig:
    def size(key: str, default: int | None = None) -> int:
        return whole(values[key] if default is None else values.get(key) or default, key)

    layers, heads = size("num_hidden_layers"), size("num_attention_heads")
    if layers > _MOST_LAYERS:  # before anything is made for each
        raise ValueError(f"num_hidden_layers must be at most {_MOST_LAYERS}; got {layers}")
    hidden = size("hidden_size")
    gemma = family == "gemma3"
    rope = values.get("rope_parameters") or {}
    # Gemma 3 keeps one set per kind of layer in newer files.
    full, sliding = rope.get("full_attention", rope), rope.get("sliding_attention", {})
    theta = full.get("rope_theta", values.get("rope_theta", 1e6 if gemma else 10_000.0))
    local_name = "rope_theta" if "rope_theta" in sliding else "rope_local_base_freq"
    local_theta = sliding.get("rope_theta", values.get("rope_local_base_freq", 10_000.0))
    window, local = _windows(values, layers, family)
    if values.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError(
            f"{source}: partial_rotary_factor other than 1 is not supported"
        )
    scale = values.get("query_pre_attn_scalar") if gemma else None
    scale = positive(scale, "query_pre_attn_scalar") ** -0.5 if scale else None
    default_head = "gelu_pytorch_tanh" if gemma else "silu"
    activation = values.get("hidden_activation") or values.get("hidden_act") or default_head
    activations: dict[str, Literal["silu", "gelu_tanh"]] = {
        "silu": "silu",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_tanh": "gelu_tanh",
    }
    if activation not in activations:
        raise UnsupportedModelError(
            f"{source}: activation {activation!r} is not supported; "
            f"supported: {', '.join(activations)}"
        )
    return DecoderConfig(
        family=family,
        vocab_size=size("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", hidden // heads),
        intermediate_size=size("intermediate_size"),
        max_position_embeddings=size("max_position_embeddings"),
        rms_norm_eps=not_negative(values.get("rms_norm_eps", 1e-6), "rms_norm_eps"),
        rope_theta=positive(theta, "rope_theta"),
        rope_scaling=_scaling(values.get("rope_scaling") or full, values, source),
        local_rope_theta=positive(local_theta, local_name) if gemma else None,
        sliding_window=window,
        local_layers=local,
        activation=activations[activation],
        # Qwen2 always has them; elsewhere `attention_bias` also means one on the output, which the
        # reader refuses when it sees it.
        qkv_bias=family == "qwen2" or bool(values.get("attention_bias", False)),
        qk_norm=family in ("qwen3", "gemma3"),
        sandwich_norms=gemma,
        attention_softcap=_softcap(values, "attn_logit_softcapping"),
        final_softcap=_softcap(values, "final_logit_softcapping"),
        attention_scale=scale,
        embedding_scale=hidden**0.5 if gemma else 1.0,
        tie_embeddings=bool(values.get("tie_word_embeddings", gemma)),
    )


def _softcap(values: dict[str, Any], key: str) -> float | None:
    return None if values.get(key) is None else positive(values[key], key)


def _windows(
    values: dict[str, Any], layers: int, family: str
) -> tuple[int | None, tuple[bool, ...]]:
    window = values.get("sliding_window")
    qwen = family in ("qwen2", "qwen3")
    if window is None or (qwen and not values.get("use_sliding_window", False)):
        return None, ()
    window = whole(window, "sliding_window")
    if kinds := values.get("layer_types"):
        return window, tuple(kind == "sliding_attention" for kind in kinds)
    if family == "gemma3":
        period = whole(values.get("sliding_window_pattern", 6), "sliding_window_pattern")
        return window, tuple((i + 1) % period != 0 for i in range(layers))
    # Mistral: all layers
    first = whole(values.get("max_window_layers", 28), "max_window_layers", least=0) if qwen else 0
    return window, tuple(i >= first for i in range(layers))


def _scaling(rope: dict[str, Any], values: dict[str, Any], source: str) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"{source}: rope scaling {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
    # Variants of YaRN that would change the angles; no model of the supported families has them.
    for name, neutral in (("mscale", None), ("mscale_all_dim", None), ("truncate", True)):
        if (value := rope.get(name, neutral)) != neutral:
            raise UnsupportedModelError(
                f"{source}: rope scaling with {name} = {value!r} is not supported"
            )
    known = ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor")
    fields = {name: positive(rope[name], name) for name in known if rope.get(name) is not None}
    trained = rope.get("original_max_position_embeddings", values["max_position_embeddings"])
    return RopeScaling(
        rope_type=kind,
        factor=positive(rope["factor"], "factor"),
        original_max_position_embeddings=whole(
            trained, "original_max_position_embeddings", least=0
        ),
        **fields,
    )
