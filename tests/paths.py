"""Where tests find real models and golden values; None where they are absent."""

import os
from pathlib import Path

import numpy as np
import pytest

from jaxinfer.folders import cache_dir

REPOSITORY = Path(__file__).resolve().parent.parent
FILES = {
    "smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf",
    "gemma3": "gemma-3-270m-q4_k_m.gguf",
    "qwen25": "Qwen2.5-Coder-0.5B-Instruct.gguf",
}
GOLDEN = {"smollm2": "smollm2", "gemma3": "gemma3-270m", "qwen25": "qwen25coder05b"}


def model_path(name: str) -> Path | None:
    """The GGUF file of a model, from $JAXINFER_TEST_MODELS or the user's cache."""
    folders = [Path(f) for f in (os.environ.get("JAXINFER_TEST_MODELS"),) if f]
    folders += [cache_dir(), cache_dir() / "models"]
    found = (folder / FILES[name] for folder in folders)
    return next((path for path in found if path.exists()), None)


def golden(name: str, suffix: str = "") -> dict[str, np.ndarray] | None:
    """Golden arrays of a model (`suffix="_jargon"` for the public-domain text).

    From `shared/golden` in the clone or beside it.
    """
    for folder in (REPOSITORY / "shared", REPOSITORY.parent / "shared"):
        path = folder / "golden" / f"{GOLDEN[name]}{suffix}.npz"
        if path.exists():
            with np.load(path) as arrays:
                return dict(arrays)
    return None


def needs_model(name: str) -> pytest.MarkDecorator:
    """Skip a test, by name, where a model's file is absent."""
    return pytest.mark.skipif(model_path(name) is None, reason=f"{FILES[name]} is not here")


def needs_golden(name: str) -> pytest.MarkDecorator:
    """Skip a test, by name, where a model's golden values are absent."""
    reason = f"golden values {GOLDEN[name]}.npz are not in shared/golden, see docs/models.md"
    return pytest.mark.skipif(golden(name) is None, reason=reason)
