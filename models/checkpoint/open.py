"""From a path to a checkpoint, and from a checkpoint to a decoder."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxinfer.models.checkpoint.base import Checkpoint
from jaxinfer.models.checkpoint.gguf import GGUFCheckpoint
from jaxinfer.models.checkpoint.huggingface import HuggingFaceCheckpoint
from jaxinfer.models.checkpoint.orbax import FILE as ORBAX_FILE
from jaxinfer.models.checkpoint.orbax import OrbaxCheckpoint
from jaxinfer.models.decoder import Decoder
from jaxinfer.models.errors import CheckpointError
from jaxinfer.models.parallel.parallel import model_mesh
from jaxinfer.models.progress import Progress


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a GGUF file, a Hugging Face directory, or a directory that `save_orbax` wrote.

    Raises:
        CheckpointError: nothing is there, or it is none of these.
        UnsupportedModelError: the model is of a kind that is not implemented.
    """
    path = Path(path)
    if path.is_file():
        return GGUFCheckpoint(path)
    if (path / ORBAX_FILE).exists():
        return OrbaxCheckpoint(path)
    if (path / "config.json").exists():
        return HuggingFaceCheckpoint(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    raise CheckpointError(
        f"{path} is no model: expected a GGUF file, or a directory with config.json "
        f"(Hugging Face) or {ORBAX_FILE} (converted)"
    )


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: Any = jnp.bfloat16,
    progress: Progress | None = None,
    mesh: str | Mesh | None = None,
) -> Decoder:
    """Build the decoder of a checkpoint, one weight at a time.

    Args:
        checkpoint: From `open_checkpoint`.
        dtype: What the weights are converted to.
        progress: Called with (name, weights read, weights in all).
        mesh: Divide the model over these devices, each of which is given its own parts only.

    Raises:
        ValueError: a mesh that cannot be made, or that models are not divided over.
        CheckpointError: a weight is missing, damaged, or of the wrong shape.
    """
    mesh = None if mesh is None else model_mesh(mesh)
    read: Any = checkpoint.read
    if mesh is not None and isinstance(checkpoint, OrbaxCheckpoint):
        read = checkpoint.read_part
    try:
        return Decoder.from_weights(
            checkpoint.config, read, dtype=dtype, progress=progress, mesh=mesh
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
