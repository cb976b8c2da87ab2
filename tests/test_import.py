"""`import jaxinfer` costs little, and brings nothing that is not needed."""

import statistics
import subprocess
import sys

import pytest

HEAVY = ("torch", "triton", "ray", "orbax", "transformers", "flax", "tokenizers", "gguf", "jinja2",
         "huggingface_hub", "rich", "tyro", "matplotlib")  # fmt: skip
RUNS = 5
LIMIT_S = 0.3


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.strip()


def test_nothing_heavy_is_imported():
    loaded = python("import sys, jaxinfer; print(*{name.split('.')[0] for name in sys.modules})")
    assert not set(HEAVY) & set(loaded.split())


def test_never_in_an_answer():
    """Not even an `LLM` needs these: they are in no default installation."""
    code = "import sys, jaxinfer; jaxinfer.LLM; print(*{n.split('.')[0] for n in sys.modules})"
    assert not {"torch", "triton", "ray", "transformers"} & set(python(code).split())


@pytest.mark.slow
def test_the_time_it_takes():
    """Beyond that of jax: the median of several processes, in turn, so that load hits both."""

    def seconds(module: str) -> float:
        return float(python(f"import time; t = time.perf_counter(); import {module}; "
                            "print(time.perf_counter() - t)"))  # fmt: skip

    pairs = [(seconds("jax"), seconds("jaxinfer, jax")) for _ in range(RUNS)]
    jax_s, both_s = (statistics.median(times) for times in zip(*pairs, strict=True))
    assert both_s - jax_s <= LIMIT_S, pairs
