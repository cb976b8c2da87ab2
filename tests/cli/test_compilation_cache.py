"""What XLA compiled for one start of the command is there for the next."""

import os

import jax
import pytest

from jaxinfer.cli.loading import keep_compiled
from tests.cli.command import run


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The user's cache folder of jaxinfer, empty; nobody has decided on JAX's."""
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    return tmp_path / "cache"


@pytest.fixture
def configured():
    """The folder that JAX has been told: none yet."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield lambda: jax.config.jax_compilation_cache_dir
    for name, value in before.items():
        jax.config.update(name, value)


def generate(model: str) -> tuple[str, str]:
    """What a start writes."""
    options = ("--model", model, "--max-tokens", "4", "--progress", "off")
    done = run("generate", "Hello", *options)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_the_second_start_finds_what_the_first_compiled(tiny, cache):
    first = generate(tiny)
    programs = {path.name for path in (cache / "xla").iterdir()}
    assert any("decode_step" in name for name in programs)
    assert generate(tiny) == first == (first[0], "")
    assert {path.name for path in (cache / "xla").iterdir()} == programs


def test_a_folder_that_cannot_be_made_breaks_nothing(tiny, cache):
    cache.write_text("a file")
    answer, messages = generate(tiny)
    assert len(answer) > 1
    assert messages == ""


def test_a_folder_that_cannot_be_written_is_left_alone(cache, configured, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    keep_compiled()
    assert configured() is None


def test_without_a_home_nothing_is_kept(cache, configured, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("jaxinfer.default_model.cache_dir", homeless)
    keep_compiled()
    assert configured() is None


@pytest.mark.parametrize("folder", ["", "/elsewhere"])
def test_the_environment_decides(cache, configured, monkeypatch, folder):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", folder)
    keep_compiled()
    assert configured() is None  # read by JAX when it is imported, which it has been
    assert not cache.exists()


def test_a_folder_that_jax_was_told_stays(cache, configured, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    keep_compiled()
    assert configured() == str(tmp_path / "mine")
    assert not cache.exists()


@pytest.mark.parametrize("limit", [None, "5"])
def test_quick_programs_are_kept_unless_the_environment_says_no(
    cache, configured, monkeypatch, limit
):
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    if limit:
        monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", limit)
    keep_compiled()
    now = jax.config.jax_persistent_cache_min_compile_time_secs
    assert now == (before if limit else 0)


def test_else_it_is_beside_the_default_model(cache, configured):
    keep_compiled()
    assert configured() == str(cache / "xla")
