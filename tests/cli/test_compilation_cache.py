"""What XLA compiled for one start of the command is there for the next."""

import os
import subprocess
import sys
import warnings

import jax
import pytest

from jaxinfer.cli.compiled import watched
from jaxinfer.cli.loading import keep_compiled
from tests.cli.command import REPOSITORY, run


@pytest.fixture
def said() -> list[str]:
    """Lines about what cannot be kept."""
    return []


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The user's cache folder of jaxinfer, empty; nobody has decided on JAX's."""
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # much is compiled, and runs once
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


def test_a_folder_that_cannot_be_written_is_left_alone(cache, configured, said, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    keep_compiled(said.append)
    assert configured() is None
    (line,) = said
    assert f"{cache / 'xla'}: Permission denied" in line


def test_without_a_home_nothing_is_kept(cache, configured, said, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("jaxinfer.default_model.cache_dir", homeless)
    keep_compiled(said.append)
    assert configured() is None
    (line,) = said
    assert "Could not determine home directory." in line


def test_a_file_in_the_place_of_the_folder(cache, configured, said):
    cache.mkdir()
    (cache / "xla").touch()
    keep_compiled(said.append)
    assert configured() is None
    assert "xla: File exists" in said[0]


@pytest.mark.parametrize("folder", ["", "/elsewhere"])
def test_the_environment_decides(cache, configured, monkeypatch, folder):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", folder)
    keep_compiled(print)
    assert configured() is None  # read by JAX when it is imported, which it has been
    assert not cache.exists()


def test_a_folder_that_jax_was_told_stays(cache, configured, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    keep_compiled(print)
    assert configured() == str(tmp_path / "mine")
    assert not cache.exists()


@pytest.mark.parametrize("limit", [None, "5"])
def test_quick_programs_are_kept_unless_the_environment_says_no(
    cache, configured, monkeypatch, limit
):
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    if limit:
        monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", limit)
    keep_compiled(print)
    now = jax.config.jax_persistent_cache_min_compile_time_secs
    assert now == (before if limit else 0)


def test_else_it_is_beside_the_default_model(cache, configured):
    keep_compiled(print)
    assert configured() == str(cache / "xla")


_ADVICE = "or name another by JAX_COMPILATION_CACHE_DIR (empty: none)"


def test_damaged_programs_are_removed_and_named_once(tiny, cache):
    answer, _ = generate(tiny)
    kept = {path: path.stat().st_size for path in (cache / "xla").iterdir()}
    assert len(kept) > 1
    for path in kept:
        os.truncate(path, 100)
    assert generate(tiny) == (
        answer, f"warning: damaged programs in {cache / 'xla'} are removed and compiled anew\n"
    )  # fmt: skip
    assert all(path.stat().st_size > 100 for path in kept)
    assert generate(tiny) == (answer, "")


_LIMITED = """
import resource, sys
from jaxinfer.cli.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
sys.exit(main())
"""


def test_a_full_disk_is_named_once_and_leaves_nothing(tiny, cache):
    options = ("--model", tiny, "--max-tokens", "4", "--progress", "off")
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, "generate", "Hello", *options],
        capture_output=True, text=True, cwd=REPOSITORY, check=False,
    )  # fmt: skip
    assert done.stderr == (
        f"warning: compiled programs cannot be kept in {cache / 'xla'} (File too large); "
        f"make room there, {_ADVICE}\n"
    )
    assert done.returncode == 0
    assert generate(tiny) == (done.stdout, "")


@pytest.mark.parametrize(
    ("folder", "reason"),
    [("/dev/null/x", "Not a directory"), ("/proc/nope", "No such file or directory")],
)
def test_a_folder_that_cannot_be_one_is_named_once(tiny, monkeypatch, folder, reason):
    """There is nothing to delete, nor can there be room."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", folder)
    _, messages = generate(tiny)
    assert messages == (
        f"warning: compiled programs cannot be read from {folder} ({reason}: "
        f"'{folder}'); name another folder by JAX_COMPILATION_CACHE_DIR (empty: none)\n"
    )


def test_other_warnings_are_shown():
    show = warnings.showwarning
    with pytest.warns(UserWarning, match="other"), watched():
        warnings.warn("other", stacklevel=1)
    assert warnings.showwarning is show


def test_entries_of_other_programs_stay(configured, tmp_path, capsys):
    """And what cannot be removed breaks nothing."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    (tmp_path / "jit_one-0-cache").mkdir()
    for name in ("jit_other-1-cache", "jit_one-1-atime"):
        (tmp_path / name).write_text("?")
    before = set(tmp_path.iterdir())
    with watched():
        for _ in range(2):
            warnings.warn(
                "Error reading persistent compilation cache entry for 'jit_one': error: cut off",
                stacklevel=1,
            )
    assert set(tmp_path.iterdir()) == before
    assert capsys.readouterr().err == (
        f"warning: compiled programs cannot be read from {tmp_path} (cut off); "
        f"delete that folder, {_ADVICE}\n"
    )
