"""Measured choices, kept as JSON per device and op: `data/<device>/<op>.json`.

A file is `{"format": 1, "command": "...", "entries": {key: {...}}}`. A missing file is normal
(heuristics decide); a damaged file or entry is a warning that names it, then heuristics decide.
"""

import functools
import json
import logging
from collections.abc import Callable
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from jaxinfer.pallas_kernels.device import DeviceSpec

logger = logging.getLogger("jaxinfer")

FORMAT = 1

_ignored: set[tuple[str, str, str]] = set()


@functools.cache
def load(op: str, device_key: str) -> dict[str, dict[str, Any]]:
    """Entries measured for `op` on a device, by key; empty if there are none."""
    file = _file(op, device_key)
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format must be {FORMAT}; got {content['format']}")
        entries = dict(content["entries"])
        for key, entry in entries.items():
            if not isinstance(entry, dict):
                raise ValueError(f"entry {key!r} must be an object; got {entry!r}")
        return entries
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("ignoring tuning data %s (%s); heuristics decide", file, error)
        return {}


def lookup(op: str, device: DeviceSpec, key: str) -> dict[str, Any] | None:
    """The measured entry for `key`, or None: then the op's heuristic decides."""
    return load(op, device.key).get(key)


def choice[T](
    op: str, device: DeviceSpec, key: str, parse: Callable[[dict[str, Any]], T]
) -> T | None:
    """What `parse` makes of the entry measured for `key`; None: the op's heuristic decides.

    An entry that it refuses is a warning that names file and key, once, and counts as none.

    Args:
        op: Name of the op.
        device: What the call runs on.
        key: Name of the call's shape.
        parse: Raises KeyError, TypeError or ValueError for an entry that cannot be used.
    """
    entry = lookup(op, device, key)
    if entry is None:
        return None
    try:
        return parse(entry)
    except (KeyError, TypeError, ValueError) as error:
        if (op, device.key, key) not in _ignored:
            _ignored.add((op, device.key, key))
            logger.warning(
                "ignoring entry %r of tuning data %s (%s: %s); the heuristic decides",
                key, _file(op, device.key), type(error).__name__, error,
            )  # fmt: skip
        return None


def _file(op: str, device_key: str) -> Traversable:
    return resources.files("jaxinfer.pallas_kernels") / "data" / device_key / f"{op}.json"
