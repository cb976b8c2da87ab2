"""GGUF files: weights dequantised on reading, tokenizer and chat template inside."""

from pathlib import Path

import numpy as np

from jaxinfer.models.checkpoint.base import GenerationDefaults
from jaxinfer.models.checkpoint.gguf_config import ARCHITECTURES, config_from_gguf
from jaxinfer.models.checkpoint.gguf_file import GGUFFile
from jaxinfer.models.checkpoint.gguf_quants import dequantize, dequantize_rows
from jaxinfer.models.errors import CheckpointError, UnsupportedModelError
from jaxinfer.models.tokenizer.from_gguf import eos_ids_from_gguf, tokenizer_from_gguf
from jaxinfer.models.tokenizer.tokenizer import Tokenizer

_NAMES = {
    "attn_norm": "attn_norm.weight",
    "q_proj": "attn_q.weight",
    "k_proj": "attn_k.weight",
    "v_proj": "attn_v.weight",
    "o_proj": "attn_output.weight",
    "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias",
    "v_bias": "attn_v.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "post_attn_norm": "post_attention_norm.weight",
    "mlp_norm": "ffn_norm.weight",
    "gate_proj": "ffn_gate.weight",
    "up_proj": "ffn_up.weight",
    "down_proj": "ffn_down.weight",
    "post_mlp_norm": "post_ffw_norm.weight",
}
_TOP = {
    "embed": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "lm_head": "output.weight",
}


class GGUFCheckpoint:
    """A GGUF file, memory-mapped; see `Checkpoint`."""

    def __init__(self, path: Path):
        """Open a file and check that it is whole.

        Raises:
            CheckpointError: not a GGUF file, or shorter than its header says.
            UnsupportedModelError: an architecture or quantisation type that is not implemented.
        """
        self.path = str(path)
        self._file = GGUFFile(path)
        metadata = self._file.metadata
        architecture = metadata.get("general.architecture")
        if architecture is None:
            raise CheckpointError(f"{path}: metadata 'general.architecture' is missing")
        if architecture not in ARCHITECTURES:
            raise UnsupportedModelError(
                f"{path}: architecture {architecture!r} is not supported; "
                f"supported in GGUF files: {', '.join(ARCHITECTURES)}"
            )
        self._architecture: str = architecture
        self.config = config_from_gguf(self._file, self.path)
        self.generation = GenerationDefaults(eos_token_ids=eos_ids_from_gguf(metadata))

    def read(self, name: str) -> np.ndarray:
        """One weight by canonical name, float32; see `Checkpoint.read`."""
        if name in _TOP:
            stored, part = _TOP[name], name
        else:
            _, layer, part = name.split(".")
            stored = f"blk.{layer}.{_NAMES[part]}"
        info = self._file.tensors.get(stored)
        if info is None:
            raise CheckpointError(f"{self.path}: tensor {stored} is missing")
        *outer, columns = info.shape
        if len(outer) > 1:
            raise CheckpointError(f"{self.path}: tensor {stored} has shape {info.shape}")
        raw, rows = self._file.raw(stored), outer[0] if outer else 1
        if self._architecture == "llama" and part in ("q_proj", "k_proj", "q_bias", "k_bias"):
            # Rows are still quantised here, so that few bytes are moved.
            units = raw if outer else raw.reshape(columns, -1)
            raw = _unpermute(units, self.config.head_dim).reshape(raw.shape)
        if not outer:
            return dequantize_rows(raw, info.kind, (1, columns))[0]
        if part == "embed":
            return dequantize_rows(raw, info.kind, (rows, columns))
        return dequantize(raw, info.kind, (rows, columns))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer in the file; see `Checkpoint.tokenizer`."""
        tokenizer = tokenizer_from_gguf(self._file.metadata, self.path)
        try:
            tokenizer.check_fits(self.config.vocab_size)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {error}") from None
        return tokenizer


def _unpermute(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of Q or K from interleaved pairs (2i, 2i+1) to halves (i, i + H/2)."""
    if rows.shape[0] % head_dim:
        raise CheckpointError(f"{rows.shape[0]} rows of Q or K are no multiple of H = {head_dim}")
    pairs = rows.reshape(-1, head_dim // 2, 2, rows.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)
