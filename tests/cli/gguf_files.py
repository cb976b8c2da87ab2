"""Small GGUF files, right and wrong."""

from pathlib import Path

import gguf
import numpy as np


def write_gguf(
    path: Path, *, architecture: str = "llama", kind: gguf.GGMLQuantizationType | None = None
) -> Path:
    """A file with a header and one tensor: enough for what is checked on opening."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(256)
    writer.add_block_count(1)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    if kind is None:
        writer.add_tensor("token_embd.weight", np.zeros((8, 256), np.float32))
    else:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = np.zeros((8, 256 // block * size), np.uint8)
        writer.add_tensor("token_embd.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
