"""Hugging Face directories of the tiny random models, written from their canonical weights.

Names and the `config.json` of each family are those that the published models have.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.models.families import CONFIGS, random_weights

# By name in `families.CONFIGS`: the architecture, and what its config.json has beyond the sizes.
FIELDS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu"},
    "llama-tied-mqa": {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
    "llama-mha": {"architectures": ["LlamaForCausalLM"], "num_key_value_heads": None},
    "llama-linear": {
        "architectures": ["LlamaForCausalLM"], "rope_theta": 500.0,
        "rope_scaling": {
            "type": "linear", "factor": 4.0, "original_max_position_embeddings": 32
        },
    },
    "llama-llama3": {
        "architectures": ["LlamaForCausalLM"], "rope_theta": 500.0,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 32,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        },
    },
    "llama-yarn": {
        "architectures": ["LlamaForCausalLM"],
        # The newer spelling: base and scaling in one place.
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "beta_fast": 4.0,
            "beta_slow": 1.0, "original_max_position_embeddings": 32,
        },
    },
    "mistral-window": {"architectures": ["MistralForCausalLM"], "sliding_window": 4},
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"], "rope_theta": 1e6, "use_sliding_window": False,
        "sliding_window": 32_768, "max_window_layers": 28,
    },
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "attention_bias": False},
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"], "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window": 5,
        "query_pre_attn_scalar": 32, "sliding_window_pattern": 3,
    },
    "gemma3-linear": {
        "architectures": ["Gemma3ForCausalLM"], "rope_theta": 1e6, "sliding_window": 5,
        "query_pre_attn_scalar": 0.21**-2, "sliding_window_pattern": 3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
}  # fmt: skip

_NAMES = {
    "attn_norm": "input_layernorm.weight",
    "q_proj": "self_attn.q_proj.weight", "q_bias": "self_attn.q_proj.bias",
    "k_proj": "self_attn.k_proj.weight", "k_bias": "self_attn.k_proj.bias",
    "v_proj": "self_attn.v_proj.weight", "v_bias": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight", "k_norm": "self_attn.k_norm.weight",
    "o_proj": "self_attn.o_proj.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate_proj": "mlp.gate_proj.weight", "up_proj": "mlp.up_proj.weight",
    "down_proj": "mlp.down_proj.weight",
}  # fmt: skip
_GEMMA_NAMES = {
    "post_attn_norm": "post_attention_layernorm.weight",
    "mlp_norm": "pre_feedforward_layernorm.weight",
    "post_mlp_norm": "post_feedforward_layernorm.weight",
}


def config_json(name: str, **overrides: Any) -> dict[str, Any]:
    """The parsed `config.json` of a model; `overrides` of None remove a field."""
    config = CONFIGS[name]
    sizes: dict[str, Any] = {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
    }  # fmt: skip
    values = sizes | FIELDS[name] | overrides
    return {key: value for key, value in values.items() if value is not None}


def stored_tensors(name: str, prefix: str = "model.") -> dict[str, np.ndarray]:
    """A model's weights as Hugging Face stores them: `[out, in]`, Gemma's norms less one."""
    gemma = CONFIGS[name].family == "gemma3"
    names = _NAMES | (_GEMMA_NAMES if gemma else {})
    tensors = {}
    for canonical, array in random_weights(name).items():
        if "norm" in canonical and gemma:
            array = array - np.float32(1)
        if canonical == "embed":
            tensors[f"{prefix}embed_tokens.weight"] = array
        elif canonical == "final_norm":
            tensors[f"{prefix}norm.weight"] = array
        elif canonical == "lm_head":
            tensors["lm_head.weight"] = np.ascontiguousarray(array.T)
        else:
            _, layer, part = canonical.split(".")
            array = np.ascontiguousarray(array.T) if array.ndim == 2 else array
            tensors[f"{prefix}layers.{layer}.{names[part]}"] = array
    return tensors


def write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values))


def write_directory(folder: Path, name: str, *, shards: int = 1, **overrides: Any) -> Path:
    """A model's directory, its weights in one file or in several with an index."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", config_json(name, **overrides))
    tensors = stored_tensors(name)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    table = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        save_file(part, folder / file)
        table |= dict.fromkeys(part, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": table})
    return folder
