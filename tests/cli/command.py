"""Run the command line in a process of its own, and a small model for it."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp

from jaxinfer.models.checkpoint.orbax import save_orbax
from jaxinfer.models.config import DecoderConfig
from jaxinfer.models.decoder import Decoder
from jaxinfer.models.tokenizer.byte import byte_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]


def command(*arguments: str) -> list[str]:
    """The command line of `jaxinfer …`."""
    return [sys.executable, "-m", "jaxinfer", *arguments]


def kept_programs(variables: Mapping[str, str]) -> dict[str, str]:
    """Variables by which a command finds what others have compiled, and keeps that for the next.

    For commands that come one after another, none of which ends while it writes a file.
    """
    return {
        "JAX_COMPILATION_CACHE_DIR": variables["JAXINFER_TEST_PROGRAMS"],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }


def run(
    *arguments: str, stdin: str = "", environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `jaxinfer …` to its end.

    Where JAX is to keep nothing that it compiles, it keeps that for the next of these runs.
    """
    variables = os.environ | (environment or {})
    if variables.get("JAX_COMPILATION_CACHE_DIR") == "":
        variables |= kept_programs(variables)
    return subprocess.run(
        command(*arguments), input=stdin, capture_output=True, text=True, timeout=300,
        cwd=REPOSITORY, env=variables, check=False,
    )  # fmt: skip


def write_tiny_model(folder: Path, **overrides: object) -> Path:
    """A random model of two layers with one token per byte and a chat template."""
    model = Decoder(DecoderConfig.tiny(**overrides), dtype=jnp.float32)
    save_orbax(folder, model, tokenizer=byte_tokenizer(eos_id=None))
    return folder
