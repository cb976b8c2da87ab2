"""Where things of the user's are kept; imported by all floors, imports none."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """The user's cache folder: `$JAXINFER_CACHE`, else `jaxinfer` in `$XDG_CACHE_HOME`.

    Raises:
        RuntimeError: none of these is set, and the user has no home.
    """
    if folder := os.environ.get("JAXINFER_CACHE"):
        return Path(folder).expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # the XDG base directory specification: invalid, to be ignored
        base = Path.home() / ".cache"
    return base / "jaxinfer"


def tuning_dir() -> Path | None:
    """The user's tuning data: `$JAXINFER_TUNING` (empty: none), else `tuning` in the cache folder.

    None also where the user has no home.
    """
    folder = os.environ.get("JAXINFER_TUNING")
    if folder == "":
        return None
    try:
        return Path(folder).expanduser() if folder else cache_dir() / "tuning"
    except RuntimeError:
        return None
