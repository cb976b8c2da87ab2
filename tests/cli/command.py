"""Run the command line in a process of its own, and a small model for it."""

import os
import subprocess
import sys
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


def run(
    *arguments: str, stdin: str = "", environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `jaxinfer …` to its end."""
    return subprocess.run(
        command(*arguments), input=stdin, capture_output=True, text=True, timeout=300,
        cwd=REPOSITORY, env=os.environ | (environment or {}), check=False,
    )  # fmt: skip


def write_tiny_model(folder: Path, **overrides: object) -> Path:
    """A random model of two layers with one token per byte and a chat template."""
    model = Decoder(DecoderConfig.tiny(**overrides), dtype=jnp.float32)
    save_orbax(folder, model, tokenizer=byte_tokenizer(eos_id=None))
    return folder
