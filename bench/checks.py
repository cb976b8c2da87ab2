"""What is refused before anything is measured: a run can take an hour."""

import json
import os
from pathlib import Path
from typing import Any

import jax

from bench import rows
from jaxinfer.sharding.mesh import what_there_is

_IDENTITY = ("op", "case", "implementation")


def check_numbers(*, repeats: int = 1, devices: int | None = None) -> None:
    """Refuse counts that no machine could serve.

    Args:
        repeats: As --repeats.
        devices: As --devices.

    Raises:
        ValueError: one of them is too small.
    """
    if repeats < 1:
        raise ValueError(f"--repeats must be at least 1; got {repeats}")
    if devices is not None and devices < 2:
        raise ValueError(f"--devices must be at least 2; got {devices}")


def check_devices(asked: int | None, there: list[Any] | None = None) -> None:
    """Refuse an op over more devices than there are.

    Args:
        asked: As --devices; None: two or more will do.
        there: Those that there are; None: JAX's.

    Raises:
        ValueError: there are fewer.
    """
    there = jax.devices() if there is None else there
    needed = asked or 2
    if needed <= len(there):
        return
    what = f"--devices {asked} needs {asked}" if asked else "ring_attention needs 2 or more"
    raise ValueError(f"{what} devices; {what_there_is(needed, there)}")


def check_json(path: Path) -> None:
    """Refuse a file that rows cannot be put into; it stays as it is.

    Raises:
        ValueError: its folder does not exist or cannot be written to, or there is something
            under its name that is not a file with a JSON list of rows.
    """
    if not path.parent.is_dir():
        raise ValueError(f"--json {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"--json {path}: cannot write into the folder {path.parent}")
    if not path.exists():
        return
    if not path.is_file():  # a device or a pipe would be replaced by a file
        raise ValueError(f"--json {path}: not a file")
    try:
        found = rows.load(path)
    except json.JSONDecodeError as error:
        raise ValueError(f"--json {path}: no JSON list of rows: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--json {path}: no JSON list of rows, nor any text") from error
    except OSError as error:
        raise ValueError(f"--json {path}: cannot be read: {error.strerror}") from error
    if not (isinstance(found, list) and all(map(_is_row, found))):
        raise ValueError(f"--json {path}: JSON, but no list of rows with {', '.join(_IDENTITY)}")


def _is_row(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in _IDENTITY)
