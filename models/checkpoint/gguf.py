"""GGUF files: weights dequantised on reading, tokenizer and chat template inside."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer.models.checkpoint.base import GenerationDefaults
from jaxinfer.models.config import DecoderConfig, RopeScaling
from jaxinfer.models.errors import CheckpointError, UnsupportedModelError
from jaxinfer.models.tokenizer.from_gguf import tokenizer_from_gguf
from jaxinfer.models.tokenizer.tokenizer import Tokenizer

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
QUANTIZATIONS = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0",
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
)  # fmt: skip

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
_TOP = {"embed": "token_embd.weight", "final_norm": "output_norm.weight", "lm_head": "output.weight"}


class GGUFCheckpoint:
    """A GGUF file, memory-mapped; see `Checkpoint`."""

    def __init__(self, path: Path):
        """Open a file and check that it is whole.

        Raises:
            CheckpointError: not a GGUF file, or shorter than its header says.
            UnsupportedModelError: an architecture or quantisation type that is not implemented.
        """
        self.path = str(path)
        self._metadata, self._tensors = _open(path)
        architecture = self._get("general.architecture")
        if architecture not in ARCHITECTURES:
            raise UnsupportedModelError(
                f"{path}: architecture {architecture!r} is not supported; "
                f"supported in GGUF files: {', '.join(ARCHITECTURES)}"
            )
        self._architecture: str = architecture
        kinds = {tensor.tensor_type.name for tensor in self._tensors.values()}
        if unknown := sorted(kinds - set(QUANTIZATIONS)):
            raise UnsupportedModelError(
                f"{path}: quantisation type {', '.join(unknown)} is not supported; "
                f"supported: {', '.join(QUANTIZATIONS)}"
            )
        self.config = self._read_config()
        eos = self._metadata.get("tokenizer.ggml.eos_token_id")
        self.generation = GenerationDefaults(eos_token_ids=() if eos is None else (int(eos),))

    def read(self, name: str) -> np.ndarray:
        """One weight by canonical name, float32; see `Checkpoint.read`."""
        if name in _TOP:
            array = self._dequantize(_TOP[name])
            return array.T if name == "lm_head" else array
        _, layer, part = name.split(".")
        array = self._dequantize(f"blk.{layer}.{_NAMES[part]}")
        if self._architecture == "llama" and part in ("q_proj", "k_proj"):
            array = _unpermute(array, self.config.head_dim)
        return array.T if array.ndim == 2 else array

    def tokenizer(self) -> Tokenizer:
        """The tokenizer in the file; see `Checkpoint.tokenizer`."""
        tokenizer = tokenizer_from_gguf(self._metadata, self.path)
        if tokenizer.vocab_size > self.config.vocab_size:
            raise CheckpointError(
                f"{self.path}: the tokenizer has {tokenizer.vocab_size} tokens, "
                f"the model only {self.config.vocab_size}"
            )
        return tokenizer

    def _get(self, key: str) -> Any:
        try:
            return self._metadata[key]
        except KeyError:
            raise CheckpointError(f"{self.path}: metadata {key!r} is missing") from None

    def _read_config(self) -> DecoderConfig:
        arch = self._architecture

        def need(key: str) -> Any:
            return self._get(f"{arch}.{key}")

        def maybe(key: str, default: Any = None) -> Any:
            return self._metadata.get(f"{arch}.{key}", default)

        hidden, heads = int(need("embedding_length")), int(need("attention.head_count"))
        layers = int(need("block_count"))
        if "token_embd.weight" not in self._tensors:
            raise CheckpointError(f"{self.path}: tensor token_embd.weight is missing")
        gemma = arch == "gemma3"
        window = maybe("attention.sliding_window") if gemma else None
        return DecoderConfig(
            family=arch,
            # GGUF prints shapes innermost first.
            vocab_size=int(self._tensors["token_embd.weight"].shape[1]),
            hidden_size=hidden,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=int(maybe("attention.head_count_kv", heads)),
            head_dim=int(maybe("attention.key_length", hidden // heads)),
            intermediate_size=int(need("feed_forward_length")),
            max_position_embeddings=int(need("context_length")),
            rms_norm_eps=float(need("attention.layer_norm_rms_epsilon")),
            rope_theta=float(maybe("rope.freq_base", 10_000.0)),
            rope_scaling=self._rope_scaling(maybe),
            # Not in the metadata: one layer in six is global, the others rotate with base 1e4.
            local_rope_theta=10_000.0 if gemma else None,
            sliding_window=None if window is None else int(window),
            local_layers=tuple((i + 1) % 6 != 0 for i in range(layers)) if window else (),
            activation="gelu_tanh" if gemma else "silu",
            qkv_bias="blk.0.attn_q.bias" in self._tensors,
            qk_norm="blk.0.attn_q_norm.weight" in self._tensors,
            sandwich_norms=gemma,
            embedding_scale=hidden**0.5 if gemma else 1.0,
            tie_embeddings="output.weight" not in self._tensors,
        )

    def _rope_scaling(self, maybe) -> RopeScaling | None:
        kind = maybe("rope.scaling.type")
        if kind in (None, "none"):
            return None
        if kind not in ("linear", "yarn"):
            raise UnsupportedModelError(
                f"{self.path}: rope scaling {kind!r} is not supported in GGUF files; "
                "supported: linear, yarn"
            )
        return RopeScaling(
            rope_type=kind,
            factor=float(maybe("rope.scaling.factor", 1.0)),
            original_max_position_embeddings=int(
                maybe("rope.scaling.original_context_length", 0)
            ),
        )

    def _dequantize(self, name: str) -> np.ndarray:
        import gguf

        tensor = self._tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.path}: tensor {name} is missing")
        array = gguf.dequantize(tensor.data, tensor.tensor_type)
        return np.asarray(array, np.float32)


def _open(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and tensors of a file, or one clear error."""
    import gguf

    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise CheckpointError(f"{path}: not a GGUF file (it starts with {magic!r})")
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        # The reader maps the file and trips over whatever lies past its end.
        raise CheckpointError(f"{path}: truncated or corrupt GGUF file ({error})") from error
    size = path.stat().st_size
    for tensor in tensors.values():
        end = int(tensor.data_offset) + int(tensor.n_bytes)
        if end > size:
            raise CheckpointError(
                f"{path}: truncated: tensor {tensor.name} ends at byte {end}, the file at {size}"
            )
    return metadata, tensors


def _unpermute(array: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of Q or K from interleaved pairs (2i, 2i+1) to halves (i, i + H/2)."""
    out, into = array.shape
    pairs = array.reshape(out // head_dim, head_dim // 2, 2, into)
    return pairs.swapaxes(1, 2).reshape(out, into)
