"""What all tests share: who needs a GPU, and the switch for shape annotations."""

import jax
import jaxtyping
import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` where JAX sees none."""
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU; JAX sees none")


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
