"""Hugging Face directories: `config.json`, safetensors (one file or several), tokenizer files."""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer.models.checkpoint.base import GenerationDefaults
from jaxinfer.models.checkpoint.generation import recommended_sampling
from jaxinfer.models.checkpoint.header_numbers import token_ids
from jaxinfer.models.checkpoint.huggingface_config import config_from_huggingface
from jaxinfer.models.checkpoint.safetensors_file import SafetensorsFile
from jaxinfer.models.errors import CheckpointError, UnsupportedModelError
from jaxinfer.models.tokenizer.from_files import tokenizer_from_directory
from jaxinfer.models.tokenizer.tokenizer import Tokenizer
from jaxinfer.models.weights import layer_shapes

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

_ATTENTION = {
    "q_proj": "self_attn.q_proj.weight",
    "k_proj": "self_attn.k_proj.weight",
    "v_proj": "self_attn.v_proj.weight",
    "o_proj": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "gate_proj": "mlp.gate_proj.weight",
    "up_proj": "mlp.up_proj.weight",
    "down_proj": "mlp.down_proj.weight",
    "attn_norm": "input_layernorm.weight",
}
_PLAIN_NORMS = {"mlp_norm": "post_attention_layernorm.weight"}
# With norms on both sides of each block, Hugging Face's names shift.
_SANDWICH_NORMS = {
    "post_attn_norm": "post_attention_layernorm.weight",
    "mlp_norm": "pre_feedforward_layernorm.weight",
    "post_mlp_norm": "post_feedforward_layernorm.weight",
}
_TOP = {"embed": "embed_tokens.weight", "final_norm": "norm.weight"}
# Where the decoder's tensors are: alone, or as the language part of a model that also sees.
_PREFIXES = ("model.", "language_model.model.", "model.language_model.")
_HEADS = ("lm_head.weight", "language_model.lm_head.weight")
# What a decoder layer of this library would leave out.
_UNSUPPORTED = ("self_attn.o_proj.bias", "mlp.gate_proj.bias", "mlp.up_proj.bias",
                "mlp.down_proj.bias")  # fmt: skip
# What may lie beside a decoder's weights. Rotary frequencies follow from the configuration; what
# Gemma 3's models see with is not read.
_TABLES = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")
_SIGHT = ("vision_tower.", "multi_modal_projector.",
          "model.vision_tower.", "model.multi_modal_projector.")  # fmt: skip


class HuggingFaceCheckpoint:
    """A directory in Hugging Face's layout; weights are read lazily. See `Checkpoint`."""

    def __init__(self, path: Path):
        """Open a directory.

        Raises:
            CheckpointError: a file is missing or damaged, or holds tensors that the configuration
                does not account for.
            UnsupportedModelError: an architecture that is not implemented.
        """
        self.path = str(path)
        self._folder = path
        values = read_json(path / "config.json")
        self.config = config_from_huggingface(values, str(path / "config.json"))
        self.generation = _generation(path, values)
        norms = _SANDWICH_NORMS if self.config.sandwich_norms else _PLAIN_NORMS
        self._names = _ATTENTION | norms
        self._files = self._locate()
        self._open: dict[Path, SafetensorsFile] = {}
        found = (prefix for prefix in _PREFIXES if f"{prefix}{_TOP['embed']}" in self._files)
        self._prefix = next(found, _PREFIXES[0])
        if self._stored_name("embed") not in self._files:
            raise CheckpointError(f"{path}: tensor {self._stored_name('embed')} is missing")
        for name in _UNSUPPORTED:
            if f"{self._prefix}layers.0.{name}" in self._files:
                raise UnsupportedModelError(
                    f"{path}: the model has {name}; biases are supported on q_proj, k_proj "
                    "and v_proj only"
                )
        self._top = {self._stored_name(name) for name in _TOP} | set(_HEADS)
        self._parts = {self._names[part] for part in layer_shapes(self.config)}
        self._layer = re.compile(rf"{re.escape(self._prefix)}layers\.(\d+)\.(.+)")
        self._check_all_used(self._files)

    def _check_all_used(self, names: Collection[str], file: Path | None = None) -> None:
        """Refuse tensors that no weight of the configuration is read from."""
        if not (left := [name for name in names if not self._is_used(name)]):
            return
        first, layers = left[0], self.config.num_layers
        found = self._layer.fullmatch(first)
        if found and int(found[1]) >= layers:
            there = {m[1] for name in {*names, *self._files} if (m := self._layer.fullmatch(name))}
            check = (
                f"config.json: num_hidden_layers is {layers}, but the files hold tensors of "
                f"{len(there)} layers"
            )
        elif found and found[2] in _ATTENTION.values() and found[2].endswith(".bias"):
            check = "attention_bias in config.json, which says that there are no biases"
        else:
            check = (
                "architectures in config.json: models of the family "
                f"{self.config.family} have no such tensor"
            )
        count = f"{len(left)} tensors" if len(left) > 1 else "1 tensor"
        raise CheckpointError(
            f"{file or self._files[first]} holds {count} that config.json does not account for, "
            f"{'the first ' if len(left) > 1 else ''}{first}; check {check}"
        )

    def _is_used(self, name: str) -> bool:
        """Whether a tensor is read, or known to be of no use here."""
        if name in self._top or name.endswith(_TABLES):
            return True
        if self.config.family == "gemma3" and name.startswith(_SIGHT):
            return True
        found = self._layer.fullmatch(name)
        if found is None:
            return False
        return int(found[1]) < self.config.num_layers and found[2] in self._parts

    def _locate(self) -> dict[str, Path]:
        """File of every tensor."""
        index = self._folder / INDEX
        if index.exists():
            table = read_json(index).get("weight_map")
            if not isinstance(table, dict) or not all(isinstance(f, str) for f in table.values()):
                raise CheckpointError(f"{index}: weight_map is missing or malformed")
            files = {name: self._folder / file for name, file in table.items()}
            if absent := sorted({str(file) for file in files.values() if not file.is_file()}):
                raise CheckpointError(f"{index} names files that are missing: {', '.join(absent)}")
            return files
        single = self._folder / SINGLE
        if not single.exists():
            raise CheckpointError(f"{self._folder}: neither {SINGLE} nor {INDEX} is there")
        return dict.fromkeys(SafetensorsFile(single).names(), single)

    def _stored_name(self, name: str) -> str:
        if name == "lm_head":
            return next((head for head in _HEADS if head in self._files), _HEADS[0])
        if name in _TOP:
            return self._prefix + _TOP[name]
        _, layer, part = name.split(".")
        return f"{self._prefix}layers.{layer}.{self._names[part]}"

    def read(self, name: str) -> np.ndarray:
        """One weight by canonical name; see `Checkpoint.read`."""
        stored = self._stored_name(name)
        path = self._files.get(stored)
        if path is None:
            raise CheckpointError(f"{self.path}: tensor {stored} is missing")
        if path not in self._open:
            self._open[path] = SafetensorsFile(path)
            self._check_all_used(self._open[path].names(), path)  # an index need not name all
        array = self._open[path].read(stored)
        if "norm" in name and self.config.family == "gemma3":
            array = array.astype(np.float32) + 1.0  # stored as the difference to 1
        return array.T if array.ndim == 2 and name != "embed" else array

    def tokenizer(self) -> Tokenizer:
        """The tokenizer beside the weights; see `Checkpoint.tokenizer`."""
        return checked_tokenizer(self._folder, self.config.vocab_size)


def checked_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a directory, refused if it cannot be the model's."""
    tokenizer = tokenizer_from_directory(folder)
    try:
        tokenizer.check_fits(vocab_size)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    return tokenizer


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing or not a JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return values


def _generation(folder: Path, config: dict[str, Any]) -> GenerationDefaults:
    """From `generation_config.json`; tokens that end an answer else from `config.json`."""
    path = folder / "generation_config.json"
    values = read_json(path) if path.exists() else {}
    try:
        sampling = recommended_sampling(values)
        if values.get("eos_token_id") is None:
            path, values = folder / "config.json", config
        ids = token_ids(values.get("eos_token_id"), "eos_token_id")
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return GenerationDefaults(eos_token_ids=ids, sampling=sampling)
