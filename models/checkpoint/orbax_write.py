"""Writing weights with Orbax so that a failure is one exception and leaves no files."""

import contextlib
import errno
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_CODE = re.compile(r"os_error_code='(\d+)'")
# Whoever needs a part of an array reads chunks, and checks files.
_CHUNK, _FILE = 1 << 20, 1 << 28  # bytes
_QUIET_S = 0.5  # nothing heard for so long: the writers have ended
_LONGEST_S = 30.0


def write_weights(folder: Path, weights: Mapping[str, Any]) -> None:
    """Create a folder with an Orbax checkpoint; after an error or Ctrl-C it is not there.

    Args:
        folder: To create; its parent exists and is removed as well after a failure.
        weights: Arrays by name.

    Raises:
        OSError: a full disk or another failure of the file system.
    """
    import orbax.checkpoint as ocp

    with _Writers() as writers:
        try:
            with ocp.PyTreeCheckpointer() as checkpointer:
                chunks = dict.fromkeys(weights, ocp.SaveArgs(chunk_byte_size=_CHUNK))
                checkpointer.save(
                    folder,
                    args=ocp.args.PyTreeSave(
                        dict(weights), save_args=chunks, ocdbt_target_data_file_size=_FILE
                    ),
                )
        except BaseException as error:
            logging.getLogger("asyncio").addFilter(_is_no_forgotten_group)
            writers.remove_what_they_write(folder.parent)
            if (code := _os_code(error)) is not None:
                raise OSError(code, os.strerror(code), str(folder)) from error
            raise


def _os_code(error: BaseException) -> int | None:
    """The operating system's error in a message of TensorStore, which raises ValueError."""
    if not isinstance(error, ValueError):
        return None
    if found := _CODE.search(str(error)):
        return int(found[1])
    return errno.ENOSPC if str(error).startswith("RESOURCE_EXHAUSTED") else None


class _Writers:
    """TensorStore's threads, which go on after one of them has failed and Orbax has given up.

    Each then finds that the event loop it reports to is closed, and shows that through
    `sys.unraisablehook`. While this is entered, such reports are counted and not shown, nor is what
    Orbax logs of the error that it also raises.
    """

    def __init__(self) -> None:
        self._heard = time.monotonic()

    def __enter__(self) -> "_Writers":
        self._logs = contextlib.ExitStack()
        for name in ("absl", "asyncio"):
            self._logs.enter_context(_without_errors(logging.getLogger(name)))
        self._hook, sys.unraisablehook = sys.unraisablehook, self._hear
        return self

    def __exit__(self, *_: object) -> None:
        if sys.unraisablehook == self._hear:  # else an end of the process took its place
            sys.unraisablehook = self._hook
        self._logs.close()

    def _hear(self, report: "sys.UnraisableHookArgs") -> None:
        error = report.exc_value
        if isinstance(error, RuntimeError) and str(error) == "Event loop is closed":
            self._heard = time.monotonic()
        else:
            self._hook(report)

    def remove_what_they_write(self, folder: Path) -> None:
        """Remove a folder again and again until no thread makes it anew."""
        start = self._heard = time.monotonic()
        while (now := time.monotonic()) - self._heard < _QUIET_S and now - start < _LONGEST_S:
            if folder.exists():
                self._heard = now
                shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.02)


def _is_no_forgotten_group(record: logging.LogRecord) -> bool:
    """False for what asyncio says of the writers' futures once the error that holds them is gone.

    That can be long after the failure, at the end of the program.
    """
    message = record.getMessage()
    return not (message.startswith("_GatheringFuture") and "never retrieved" in message)


@contextlib.contextmanager
def _without_errors(logger: logging.Logger) -> Iterator[None]:
    def passes(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR

    logger.addFilter(passes)
    try:
        yield
    finally:
        logger.removeFilter(passes)
