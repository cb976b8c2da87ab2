"""From what `LLM` was given to a decoder and its tokenizer."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxinfer.engine.sizing import context_length
from jaxinfer.models.checkpoint.open import load_model, open_checkpoint
from jaxinfer.models.config import DecoderConfig
from jaxinfer.models.decoder import Decoder
from jaxinfer.models.parallel.parallel import Parallel, model_mesh
from jaxinfer.models.tokenizer.tokenizer import Tokenizer
from jaxinfer.progress import Progress


def load_pair(
    model: str | Path | tuple[Decoder, Tokenizer | None],
    dtype: str,
    implementation: str | None,
    progress: Progress | None,
    mesh: str | Mesh | None = None,
    max_model_len: int | None = None,
) -> tuple[Decoder, Tokenizer | None]:
    """A decoder and its tokenizer; arguments and errors as in `jaxinfer.LLM`."""
    if isinstance(model, tuple):
        if dtype != "auto":
            raise ValueError("dtype applies to a model that is loaded; this one is a decoder")
        if len(model) != 2 or not isinstance(model[0], Decoder):
            raise TypeError(f"a pair must be (Decoder, Tokenizer or None); got {model!r:.80}")
        decoder, tokenizer = model
        if mesh is not None:
            decoder = decoder.divide(mesh)
        check_implementation(implementation, decoder.part, decoder.embed[...].dtype)
        return decoder, tokenizer
    if not isinstance(model, str | Path):
        raise TypeError(f"model must be a name, a path or a pair; got {model!r:.80}")
    dtype = dtype_name(dtype)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be auto, float32, bfloat16 or float16; got {dtype!r}")
    mesh = None if mesh is None else model_mesh(mesh)  # before anything is downloaded
    # Downloading needs modules that a local model does not.
    from jaxinfer.hub import resolve_model

    checkpoint = open_checkpoint(resolve_model(model, progress))
    context_length(max_model_len, checkpoint.config)  # before weights are read
    tokenizer = checkpoint.tokenizer()
    check_implementation(implementation, part_of(checkpoint.config, mesh), jnp.dtype(dtype))
    decoder = load_model(checkpoint, dtype=jnp.dtype(dtype), progress=progress, mesh=mesh)
    return decoder, tokenizer


def part_of(config: DecoderConfig, mesh: str | Mesh | None) -> DecoderConfig:
    """The shape that one device of a mesh computes; without one, the whole."""
    return config if mesh is None else Parallel.create(config, mesh).local


def dtype_name(name: str, platform: str | None = None) -> str:
    """A dtype of weights by name; `"auto"`: float32 on a CPU, bfloat16 elsewhere.

    Args:
        name: Of a JAX dtype, or `"auto"`.
        platform: `"cpu"` or `"gpu"`; default: what JAX runs on.

    >>> dtype_name("auto", "gpu"), dtype_name("float16")
    ('bfloat16', 'float16')
    """
    if name != "auto":
        return name
    return "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"


def check_implementation(name: str | None, config: DecoderConfig, dtype: Any) -> None:
    """Refuse a name that no op has: ops that lack one keep their own, so nobody would notice."""
    if name is not None:
        from jaxinfer import op_choices

        op_choices.check_implementation(name, config, dtype)
