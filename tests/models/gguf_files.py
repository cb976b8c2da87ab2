"""GGUF files of the tiny random models, written with the `gguf` package."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.models.families import CONFIGS, random_weights

Kind = gguf.GGMLQuantizationType
# Of the names in `families.CONFIGS`, those that GGUF files hold.
ARCHITECTURES = {
    "llama": "llama", "llama-tied-mqa": "llama", "llama-linear": "llama", "llama-yarn": "llama",
    "llama-mha": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3",
}  # fmt: skip
_NAMES = {
    "attn_norm": "attn_norm.weight", "mlp_norm": "ffn_norm.weight",
    "q_proj": "attn_q.weight", "k_proj": "attn_k.weight", "v_proj": "attn_v.weight",
    "q_bias": "attn_q.bias", "k_bias": "attn_k.bias", "v_bias": "attn_v.bias",
    "q_norm": "attn_q_norm.weight", "k_norm": "attn_k_norm.weight",
    "o_proj": "attn_output.weight", "gate_proj": "ffn_gate.weight", "up_proj": "ffn_up.weight",
    "down_proj": "ffn_down.weight", "post_attn_norm": "post_attention_norm.weight",
    "post_mlp_norm": "post_ffw_norm.weight",
}  # fmt: skip
_TOP = {"embed": "token_embd.weight", "final_norm": "output_norm.weight",
        "lm_head": "output.weight"}  # fmt: skip


def permuted(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of Q or K in llama's order: row i of each half of a head becomes row 2i or 2i + 1."""
    out = np.empty_like(rows)
    half = head_dim // 2
    for row in range(len(rows)):
        head, place = divmod(row, head_dim)
        side, pair = divmod(place, half)
        out[head * head_dim + 2 * pair + side] = rows[row]
    return out


def stored_tensors(name: str) -> dict[str, np.ndarray]:
    """A model's weights as a GGUF file holds them: `[out, in]`, norms whole."""
    config = CONFIGS[name]
    tensors = {}
    for canonical, array in random_weights(name).items():
        if canonical in _TOP:
            tensors[_TOP[canonical]] = array.T if canonical == "lm_head" else array
            continue
        _, layer, part = canonical.split(".")
        array = array.T if array.ndim == 2 else array
        if ARCHITECTURES[name] == "llama" and part in ("q_proj", "k_proj", "q_bias", "k_bias"):
            array = permuted(array, config.head_dim)
        tensors[f"blk.{layer}.{_NAMES[part]}"] = array
    return {key: np.ascontiguousarray(array) for key, array in tensors.items()}


def metadata(name: str) -> dict[str, Any]:
    """Fields of a file without the architecture in front; None removes one when overridden."""
    config = CONFIGS[name]
    values: dict[str, Any] = {
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "block_count": config.num_layers, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads, "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim, "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
    }  # fmt: skip
    if ARCHITECTURES[name] == "gemma3":
        values |= {"attention.sliding_window": 5, "attention.sliding_window_pattern": 3}
    if scaling := config.rope_scaling:
        values |= {
            "rope.scaling.type": scaling.rope_type, "rope.scaling.factor": scaling.factor,
            "rope.scaling.original_context_length": scaling.original_max_position_embeddings,
            "rope.scaling.yarn_beta_fast": scaling.beta_fast,
            "rope.scaling.yarn_beta_slow": scaling.beta_slow,
        }  # fmt: skip
    return values


def write(
    path: Path,
    fields: dict[str, Any],
    tensors: dict[str, np.ndarray],
    *,
    architecture: str = "llama",
    kinds: dict[str, Kind] | None = None,
    alignment: int | None = None,
) -> Path:
    """A file with any fields (by full name) and tensors.

    Args:
        path: Of the file.
        fields: Integers, floats, booleans, texts, and lists of these.
        tensors: float32, or already quantised bytes for those in `kinds`.
        architecture: `general.architecture`.
        kinds: Quantisation of tensors that are not float32.
        alignment: `general.alignment`, if the file has it.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        _add(writer, key, value)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, array in tensors.items():
        writer.add_tensor(key, array, raw_dtype=(kinds or {}).get(key))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def write_model(
    path: Path,
    name: str,
    *,
    extra_tensors: dict[str, np.ndarray] | None = None,
    without: tuple[str, ...] = (),
    tokenizer: dict[str, Any] | None = None,
    fields: dict[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """A model's file. `fields`, and `overrides` (`a__b` for `a.b`), replace; None removes."""
    architecture = ARCHITECTURES[name]
    changed = {key.replace("__", "."): value for key, value in overrides.items()}
    every = metadata(name) | changed | (fields or {})
    stored = {f"{architecture}.{key}": v for key, v in every.items() if v is not None}
    tensors = stored_tensors(name) | (extra_tensors or {})
    for key in without:
        del tensors[key]
    return write(path, stored | (tokenizer or {}), tensors, architecture=architecture)
