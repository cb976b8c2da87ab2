"""From a model's name to something that runs, with progress."""

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from jaxinfer.cli import interrupts
from jaxinfer.cli.errors import one_line
from jaxinfer.progress import Reporter

if TYPE_CHECKING:
    from jaxinfer.cli.options import Model
    from jaxinfer.llm import LLM
    from jaxinfer.models.checkpoint.base import Checkpoint
    from jaxinfer.models.decoder import Decoder
    from jaxinfer.models.tokenizer.tokenizer import Tokenizer


def fetch(name: str, reporter: Reporter) -> Path:
    """A model's files, downloaded if need be; see `hub.resolve_model`."""
    from jaxinfer.hub import DEFAULT, resolve_model

    interrupts.work_begins()
    with contextlib.ExitStack() as inside:
        if name == DEFAULT:  # pip runs; huggingface-hub has threads instead, which go by themselves
            inside.enter_context(interrupts.ended_cleanly())
        progress = inside.enter_context(
            reporter.task("download", unit="bytes", quiet=True, late=True)
        )
        return resolve_model(name, progress)


def open_model(name: str, reporter: Reporter) -> tuple["Checkpoint", "Tokenizer"]:
    """A model's shape, defaults and tokenizer; quick, so that bad input is found before weights."""
    from jaxinfer.models.checkpoint.open import open_checkpoint

    find_devices()
    checkpoint = open_checkpoint(fetch(name, reporter))
    return checkpoint, checkpoint.tokenizer()


def find_devices() -> None:
    """Let JAX look for its devices.

    Raises:
        RuntimeError: there is none of the kind that the environment names.
    """
    import jax

    try:
        jax.devices()
    except AssertionError as error:  # all that JAX says where a platform's plugin is missing
        raise RuntimeError(
            f"JAX found no device for JAX_PLATFORMS={jax.config.jax_platforms}: its plugin is not "
            "installed, or it sees no such device; unset JAX_PLATFORMS, or for NVIDIA GPUs "
            "pip install 'jaxinfer[cuda13]'"
        ) from error


def keep_compiled(note: Callable[[str], object]) -> None:
    """Let JAX keep what it compiles in jaxinfer's cache folder, so that the next start is quicker.

    Not where the user has named a folder or said that there is none. The key of an entry holds
    versions and the features of the processor, so machines may share a home.

    Args:
        note: Gets a line where nothing can be kept there.
    """
    import jax

    from jaxinfer.default_model import cache_dir

    decided = jax.config.jax_compilation_cache_dir is not None
    if decided or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        folder = cache_dir() / "xla"
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    except (OSError, RuntimeError) as error:  # no home, or one that cannot be written
        note(
            f"compiled programs are not kept for the next start: {one_line(error)} "
            f"(JAX_COMPILATION_CACHE_DIR names another folder, or, empty, none)"
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # JAX leaves out what compiled within a second, which much of a small model does.
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def load_weights(
    checkpoint: "Checkpoint", dtype: str, reporter: Reporter, mesh: str | None = None
) -> "Decoder":
    """Read a model's weights.

    Args:
        checkpoint: From `open_model`.
        dtype: Name of a JAX dtype, or `"auto"`.
        reporter: Shows progress.
        mesh: Sizes of its axes; None: one device.
    """
    import jax.numpy as jnp

    from jaxinfer.loading import dtype_name
    from jaxinfer.models.checkpoint.open import load_model

    keep_compiled(reporter.note)
    with reporter.task("load", unit="weights") as progress:
        return load_model(
            checkpoint, dtype=jnp.dtype(dtype_name(dtype)), progress=progress, mesh=mesh
        )


def start_engine(
    checkpoint: "Checkpoint", tokenizer: "Tokenizer", options: "Model", reporter: Reporter
) -> "LLM":
    """Read the weights and build an engine.

    Raises:
        ValueError: an implementation or a mesh that does not exist, or sizes that do not fit the
            model.
    """
    from jaxinfer.llm import LLM
    from jaxinfer.loading import check_implementation, dtype_name, part_of

    part = part_of(checkpoint.config, options.mesh)
    check_implementation(options.implementation, part, dtype_name(options.dtype))
    model = load_weights(checkpoint, options.dtype, reporter, options.mesh)
    return LLM(
        (model, tokenizer),
        max_model_len=options.max_model_len,
        num_gpu_blocks_override=options.num_gpu_blocks_override,
        gpu_memory_utilization=options.gpu_memory_utilization,
        implementation=options.implementation,
        softmax=options.softmax,
    )
