"""Measured choices, kept as JSON per device and op: `data/<device>/<op>.json`.

A file is `{"format": 1, "command": "...", "entries": {key: {...}}}`. A missing file is normal
(heuristics decide); a damaged one is a warning that names it, then heuristics decide.
"""

import functools
import json
import logging
from importlib import resources
from typing import Any

from jaxinfer.pallas_kernels.device import DeviceSpec

logger = logging.getLogger("jaxinfer")

FORMAT = 1


@functools.cache
def load(op: str, device_key: str) -> dict[str, dict[str, Any]]:
    """Entries measured for `op` on a device, by key; empty if there are none."""
    file = resources.files("jaxinfer.pallas_kernels") / "data" / device_key / f"{op}.json"
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
