"""Small models that the command-line tests share."""

import pytest

from tests.cli.command import write_tiny_model
from tests.compiling import compiled_once


@pytest.fixture(scope="package", autouse=True)
def quickly(tmp_path_factory):
    """Commands in this process compile the same programs once; others compile anew."""
    with compiled_once(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    """The user's cache is left alone."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """A random model that knows bytes, context 512, as the name of its directory."""
    return str(write_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="session")
def long_context(tmp_path_factory) -> str:
    """The same with a context that no test fills."""
    folder = tmp_path_factory.mktemp("models") / "long"
    return str(write_tiny_model(folder, max_position_embeddings=20_000))
