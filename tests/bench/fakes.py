"""Made-up rows, result folders and cases."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from bench.case import Measurement
from bench.rows import Machine, Row, save

MACHINE = Machine(
    device="NVIDIA H100 80GB HBM3",
    driver="580.1",
    jax="0.11.2",
    commit="abc1234",
    date="2026-01-02",
)
KEY = "nvidia_h100_80gb_hbm3"


def row(case: str, implementation: str, median_us: float, **other: object) -> Row:
    """A row of `add_rms_norm` with a floor of 1 µs."""
    floor = other.pop("floor_us", 1.0)
    assert isinstance(floor, float)
    fields = {
        "op": "add_rms_norm", "case": case, "implementation": implementation,
        "median_us": median_us, "iqr_us": 0.1, "tflops": 1.0, "gbps": 1.0, "floor_us": floor,
        "floor_share": floor / median_us, "rel_rms": 1e-3, "compile_s": 0.5,
    }  # fmt: skip
    return fields | dataclasses.asdict(MACHINE) | other


def write(results: Path, rows: list[Row], *, op: str = "add_rms_norm", key: str = KEY) -> Path:
    """Put rows into a results folder, which is returned."""
    save(results / key / f"{op}.json", rows)
    return results


@dataclasses.dataclass
class FakeCase:
    """A case whose implementations give what they are told, or raise it."""

    outcomes: Mapping[str, Measurement | Exception]
    name: str = "fake b1"
    tag: str = "primary"
    flops: float = 2e6
    bytes: float = 1e6

    @property
    def implementations(self) -> tuple[str, ...]:
        return tuple(self.outcomes)

    def measure(self, implementation: str, *, repeats: int) -> Measurement:
        outcome = self.outcomes[implementation]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome
