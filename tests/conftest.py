"""What all tests share: XLA's threads, who needs a GPU, and the switch for shape annotations."""

import os
from pathlib import Path

# The interpreter of Mosaic kernels blocks a thread of XLA's pool for every barrier that waits; a
# pool no larger than that waits for ever. XLA sizes it by this variable, or by the cores.
os.environ["NPROC"] = "8"
# There is a process for each core: to compile a program in parts is more work, for nobody.
os.environ["XLA_FLAGS"] = (
    "--xla_cpu_parallel_codegen_split_count=1 " + os.environ.get("XLA_FLAGS", "")
).rstrip()

import jax
import jaxtyping
import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: at the end, no process works on one while the others have nothing left.

    Every process begins with its share of them, as pytest-xdist hands out parts of equal length.
    The others stay neighbours, which share what they compile.
    """
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    slow = [item for item in items if item.get_closest_marker("slow")]
    others = [item for item in items if not item.get_closest_marker("slow")]
    ordered = []
    for i in range(processes):
        start, end = (len(others) * j // processes for j in (i, i + 1))
        ordered += slow[i::processes] + others[start:end]
    items[:] = ordered


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` where JAX sees none."""
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU; JAX sees none")


@pytest.fixture(scope="session", autouse=True)
def programs(tmp_path_factory):
    """Where commands keep what they compile, each for the next (`tests/cli/command.py`)."""
    os.environ["JAXINFER_TEST_PROGRAMS"] = str(tmp_path_factory.mktemp("programs"))


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Forget what was compiled before it takes more pieces of memory than Linux maps (65,530).

    Every program is a few; XLA crashes while it compiles one too many.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > 20_000:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def nothing_tuned(monkeypatch):
    """Whatever the user of this machine has measured, tests see the package's tuning data only."""
    monkeypatch.setenv("JAXINFER_TUNING", "")


@pytest.fixture
def unchecked():
    """Turn shape annotations off: users run without them and see the function's own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
