"""From measured rows to the tables that choosers read: `pallas_kernels/data/<device>/<op>.json`."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from bench import rows
from bench.cases import flat_matmul
from jaxinfer.pallas_kernels import tuning
from jaxinfer.pallas_kernels.device import current_device
from jaxinfer.pallas_kernels.matmul.config import key
from jaxinfer.pallas_kernels.matmul.specs import SPECS

DATA = Path(__file__).parent.parent / "pallas_kernels" / "data"
COMMAND = "python -m bench run --op flat_matmul --save && python -m bench tune"


def tune_matmul(measured: list[rows.Row]) -> dict[str, dict[str, Any]]:
    """The fastest implementation of every measured product, by the chooser's key."""
    specs = {spec.name: spec for spec in SPECS}
    by_case: dict[str, dict[str, float]] = {}
    for row in measured:
        by_case.setdefault(row["case"], {})[row["implementation"]] = row["median_us"]
    entries = {}
    for name, times in by_case.items():
        rivals = {n: us for n, us in times.items() if n == "xla" or n in flat_matmul.TILINGS}
        if "xla" not in rivals or len(rivals) < 2:
            continue  # nothing was compared
        spec = specs[name]
        best = min(rivals, key=lambda rival: rivals[rival])
        entry: dict[str, Any] = {"implementation": "xla" if best == "xla" else "mosaic"}
        if best != "xla":
            config = flat_matmul.tiling(spec, best)
            assert config is not None, "it was measured"
            entry["config"] = dataclasses.asdict(config)
        entry["us"] = {n: rivals[n] for n in ("xla", best)}
        gated = spec.gate is not None
        product = key(M=spec.M, K=spec.K, N=spec.N, gated=gated, transposed=spec.transposed)
        entries[product] = entry
    return entries


def write(folder: Path = DATA) -> Path:
    """Make the table of this device from its committed rows.

    Raises:
        ValueError: nothing was measured on this device.
    """
    device = current_device()
    measured = rows.load(rows.results_of(device, "flat_matmul"))
    if not measured:
        raise ValueError(f"no rows of flat_matmul on {device.name}; first run: {COMMAND}")
    content = {"format": tuning.FORMAT, "command": COMMAND, "entries": tune_matmul(measured)}
    path = folder / device.key / "matmul.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(part, path)
    return path
