"""From a model's name to something that runs, with progress."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxinfer.progress import Reporter

if TYPE_CHECKING:
    from jaxinfer.cli.options import Model
    from jaxinfer.llm import LLM
    from jaxinfer.models.checkpoint.base import Checkpoint
    from jaxinfer.models.decoder import Decoder
    from jaxinfer.models.tokenizer.tokenizer import Tokenizer


def fetch(name: str, reporter: Reporter) -> Path:
    """A model's files, downloaded if need be; see `hub.resolve_model`."""
    from jaxinfer.hub import resolve_model

    with reporter.task("download", unit="bytes", quiet=True) as progress:
        return resolve_model(name, progress)


def open_model(name: str, reporter: Reporter) -> tuple["Checkpoint", "Tokenizer"]:
    """A model's shape, defaults and tokenizer; quick, so that bad input is found before weights."""
    from jaxinfer.models.checkpoint.open import open_checkpoint

    checkpoint = open_checkpoint(fetch(name, reporter))
    return checkpoint, checkpoint.tokenizer()


def dtype_of(name: str) -> Any:
    """The JAX dtype of a name; `"auto"`: float32 on a CPU, bfloat16 on a GPU."""
    import jax
    import jax.numpy as jnp

    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def load_weights(checkpoint: "Checkpoint", dtype: str, reporter: Reporter) -> "Decoder":
    """Read a model's weights.

    Args:
        checkpoint: From `open_model`.
        dtype: Name of a JAX dtype, or `"auto"`.
        reporter: Shows progress.
    """
    from jaxinfer.models.checkpoint.open import load_model

    with reporter.task("load", unit="weights") as progress:
        return load_model(checkpoint, dtype=dtype_of(dtype), progress=progress)


def start_engine(
    checkpoint: "Checkpoint", tokenizer: "Tokenizer", options: "Model", reporter: Reporter
) -> "LLM":
    """Read the weights and build an engine.

    Raises:
        ValueError: an implementation that does not exist, or sizes that do not fit the model.
    """
    from jaxinfer.llm import LLM

    if options.implementation is not None:
        from jaxinfer.op_choices import check_implementation

        dtype = dtype_of(options.dtype)
        check_implementation(options.implementation, checkpoint.config, dtype)
    model = load_weights(checkpoint, options.dtype, reporter)
    return LLM(
        (model, tokenizer),
        max_model_len=options.max_model_len,
        num_gpu_blocks_override=options.num_gpu_blocks_override,
        gpu_memory_utilization=options.gpu_memory_utilization,
        implementation=options.implementation,
    )
