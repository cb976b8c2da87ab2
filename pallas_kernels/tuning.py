"""Measured choices, kept as JSON per device and op: `<folder>/<device>/<op>.json`.

Two folders are read: the user's (`folders.tuning_dir`), which `jaxinfer tune` writes, and `data` of
this package. Where both have an entry for a key, the user's counts.

A file is `{"format": 1, "command": "...", "entries": {key: {...}}}`. That one of both is missing is
normal; a damaged file or entry is a warning that names it. Then the other folder decides, and where
it has nothing either, the op's heuristic. That an op has neither file is a warning on GPUs for
which there could be one.
"""

import contextlib
import functools
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from jaxinfer.folders import tuning_dir
from jaxinfer.pallas_kernels.device import DeviceSpec

logger = logging.getLogger("jaxinfer")

FORMAT = 1
# Of what is no JSON, is nested too deeply, has other fields or numbers that no float holds.
_DAMAGED = (KeyError, OverflowError, RecursionError, TypeError, ValueError)

_ignored: set[tuple[str, str]] = set()
_without: set[str] = set()  # ops of which it was said that they have no file
_making: list[bool] = []


def files(op: str, device: DeviceSpec) -> list[Traversable]:
    """Where entries of `op` for a device are looked for, in order; the files need not exist."""
    folders: list[Traversable] = [resources.files("jaxinfer.pallas_kernels") / "data"]
    if (mine := tuning_dir()) is not None:
        folders.insert(0, mine)
    return [folder / device.key / f"{op}.json" for folder in folders]


@functools.cache
def load(file: Traversable) -> dict[str, dict[str, Any]]:
    """Entries of a file by key; empty if there are none, or it is damaged, which is a warning."""
    try:
        if not file.is_file():
            return {}
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format must be {FORMAT}; got {content['format']}")
        entries = dict(content["entries"])
        for key, entry in entries.items():
            if not isinstance(entry, dict):
                raise ValueError(f"entry {key!r} must be an object; got {entry!r}")
        return entries
    except (OSError, *_DAMAGED) as error:
        logger.warning("ignoring tuning data %s (%s); others or the heuristic decide", file, error)
        return {}


def lookup(op: str, device: DeviceSpec, key: str) -> list[tuple[str, dict[str, Any]]]:
    """Names of files and the entries that they have for `key`, the one that counts first.

    That there is no file is a warning, once for an op: on Hopper GPUs, for whose kernels there are
    choices, unless they are `being_made`.
    """
    known = files(op, device)
    if device.is_hopper and op not in _without and not _making and not any(map(_exists, known)):
        _without.add(op)
        logger.warning(
            "%s has no tuning table for %s (there is no %s): a heuristic decides, and "
            "`jaxinfer tune MODEL` measures one",
            op, device.name, " nor ".join(map(str, known)),
        )  # fmt: skip
    return [(str(file), entries[key]) for file in known if key in (entries := load(file))]


@contextlib.contextmanager
def being_made() -> Iterator[None]:
    """Inside, nothing is said of files that do not exist."""
    _making.append(True)
    try:
        yield
    finally:
        _making.pop()


def _exists(file: Traversable) -> bool:
    try:
        return file.is_file()
    except OSError:  # somewhere that may not be read: `load` warns of it
        return True


def choice[T](
    op: str, device: DeviceSpec, key: str, parse: Callable[[dict[str, Any]], T]
) -> T | None:
    """What `parse` makes of the entry measured for `key`; None: the op's heuristic decides.

    An entry that it refuses is a warning that names file and key, once, and counts as none.

    Args:
        op: Name of the op.
        device: What the call runs on.
        key: Name of the call's shape.
        parse: Raises one of KeyError, OverflowError, TypeError and ValueError for an entry that
            cannot be used.
    """
    for file, entry in lookup(op, device, key):
        try:
            return parse(entry)
        except _DAMAGED as error:
            if (file, key) not in _ignored:
                _ignored.add((file, key))
                logger.warning(
                    "ignoring entry %r of tuning data %s (%s: %s); others or the heuristic decide",
                    key, file, type(error).__name__, error,
                )  # fmt: skip
    return None


def save(
    folder: Path,
    op: str,
    device: DeviceSpec,
    entries: Mapping[str, Mapping[str, Any]],
    command: str,
    *,
    keep: bool = True,
) -> Path:
    """Put entries into a folder's file, beside those of other keys; the file's path.

    The file is replaced as a whole, so that an interrupted call leaves the old one. A damaged file
    is put aside under another name, with a warning.

    Args:
        folder: Where the file of every device and op has its place.
        op: Name of the op.
        device: What was measured.
        entries: By key.
        command: What measured them.
        keep: Whether entries of other keys stay.

    Raises:
        ValueError: the file has a format that this version does not know; it is left alone.
        OSError: the file cannot be written.
    """
    path = folder / device.key / f"{op}.json"
    others = _entries_of(path) if keep else {}
    content = {"format": FORMAT, "command": command, "entries": others | dict(entries)}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    load.cache_clear()
    return path


def _entries_of(path: Path) -> dict[str, dict[str, Any]]:
    """What a file holds that is about to be replaced."""
    load.cache_clear()  # another process may have added to it
    if not path.exists():
        return {}
    try:
        version = json.loads(path.read_text(encoding="utf-8"))["format"]
    except _DAMAGED:
        aside = path.with_suffix(".damaged")
        os.replace(path, aside)
        logger.warning("%s is damaged; it is now %s", path, aside)
        return {}
    if version != FORMAT:
        raise ValueError(
            f"{path} has format {version}, and this version of jaxinfer writes {FORMAT}: "
            "move the file away to measure anew"
        )
    return load(path)
