"""Rows of results: one JSON object each, in `bench/results/<device>/<op>.json`."""

import dataclasses
import datetime
import json
import os
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from bench.case import Case, Measurement
from jaxinfer.pallas_kernels.device import DeviceSpec, current_device

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What all rows of a run share.

    Attributes:
        device: Its name.
        driver: Version of the GPU's driver; empty on a CPU.
        jax: Version.
        commit: Of this repository.
        date: Day, ISO.
    """

    device: str
    driver: str
    jax: str
    commit: str
    date: str

    @classmethod
    def here(cls, commit: str = "") -> "Machine":
        """This machine; `commit` where the checkout has no history."""
        device = current_device()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return cls(
            device=device.name,
            driver=_first_line(query) if device.platform == "gpu" else "",
            jax=jax.__version__,
            commit=commit or _first_line(["git", "describe", "--always", "--dirty"]) or "unknown",
            date=datetime.date.today().isoformat(),
        )


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.partition("\n")[0].strip()


def make_row(op: str, case: Case, name: str, measured: Measurement, machine: Machine) -> Row:
    """The row of one measurement; times in µs, rates in TFLOP/s and GB/s (10^9 bytes)."""
    median = measured.median_us
    floor = current_device().floor_us(flops=case.flops, bytes=case.bytes)
    row = {
        "op": op,
        "case": case.name,
        "implementation": name,
        "median_us": _digits(median),
        "iqr_us": _digits(measured.iqr_us),
        "tflops": _digits(case.flops / median / 1e6),
        "gbps": _digits(case.bytes / median / 1e3),
        "floor_us": _digits(floor),
        "floor_share": _digits(floor / median),
        "rel_rms": float(f"{measured.rel_rms:.2e}"),
        "compile_s": round(measured.compile_s, 2),
        **dataclasses.asdict(machine),
    }
    if measured.implementation:
        row["ran"] = measured.implementation
    return row | {key: _digits(value) for key, value in measured.extra.items()}


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def _identity(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["op"], row["case"], row["implementation"]


def load(path: Path) -> list[Row]:
    """The rows of a file; none if there is no file."""
    return json.loads(path.read_text()) if path.exists() else []


def save(path: Path, rows: Iterable[Row]) -> None:
    """Put rows into a file; rows of the same op, case and implementation are replaced.

    The file is replaced as a whole, so that an interrupted run leaves the old one.
    """
    kept = {_identity(row): row for row in load(path)}
    kept |= {_identity(row): row for row in rows}
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in kept.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")  # not the name of a file of the user's
    part.write_text(f"[\n{lines}\n]\n")
    os.replace(part, path)


def results_of(device: DeviceSpec, op: str) -> Path:
    """Where the rows of an op on a device are kept."""
    return RESULTS / device.key / f"{op}.json"
