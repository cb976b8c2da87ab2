"""Measure a model's products one after another; what was measured is kept at once."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxinfer.autotune.measure import Times, measure
from jaxinfer.pallas_kernels import tuning
from jaxinfer.pallas_kernels.decision import decide
from jaxinfer.pallas_kernels.device import DeviceSpec
from jaxinfer.pallas_kernels.matmul.config import candidates
from jaxinfer.pallas_kernels.matmul.mosaic_sm90 import Config
from jaxinfer.pallas_kernels.matmul.specs import MatmulSpec
from jaxinfer.progress import Progress

# One program per implementation and tiling. To compile it took 0.4 to 0.75 s on a machine with an
# H100 (`compile_s` in bench/results); the rest is for inputs and timing.
_SECONDS_EACH = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tuned:
    """What was found for one product.

    Attributes:
        spec: The product.
        entry: As `decide` made it of the times.
    """

    spec: MatmulSpec
    entry: dict[str, Any]

    @property
    def is_kernel(self) -> bool:
        """Whether the kernel was chosen."""
        return self.entry["implementation"] == "mosaic"

    @property
    def xla_us(self) -> float:
        """Time of XLA, µs."""
        return self.entry["us"]["xla"]

    @property
    def kernel_us(self) -> float:
        """Time of the kernel with its best tiling, µs."""
        return self.entry["us"]["mosaic"]

    @property
    def us(self) -> float:
        """Time of what was chosen, µs."""
        return self.kernel_us if self.is_kernel else self.xla_us


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What there is to measure.

    Attributes:
        tilings: By product, those of the kernel that compete with XLA.
        refused: Products that the kernel cannot compute, and for which XLA is taken.
    """

    tilings: dict[MatmulSpec, list[Config]]
    refused: list[MatmulSpec]

    @classmethod
    def of(cls, specs: Sequence[MatmulSpec], device: DeviceSpec) -> "Plan":
        """The plan for products on a device."""
        tilings = {
            spec: candidates(device, M=spec.M, K=spec.K, N=spec.N, gated=spec.gate is not None)
            for spec in specs
        }
        return cls(
            tilings={spec: some for spec, some in tilings.items() if some},
            refused=[spec for spec, some in tilings.items() if not some],
        )

    @property
    def seconds(self) -> float:
        """About how long it will take."""
        return _SECONDS_EACH * sum(1 + len(some) for some in self.tilings.values())


def tune(
    plan: Plan,
    device: DeviceSpec,
    *,
    folder: Path,
    command: str,
    progress: Progress,
) -> Iterator[Tuned]:
    """Measure a plan's products, and yield each when it is in the device's tuning data.

    Args:
        plan: What to measure.
        device: That of this process; its key names the data.
        folder: For the data, as in `tuning.save`.
        command: For the file.
        progress: Called with (product, products done, products in all).

    Raises:
        OSError: the file cannot be written.
        WrongResult: an implementation computes something else.
    """
    known: dict[str, Times] = {}  # two products of a model may be alike
    for done, (spec, tilings) in enumerate(plan.tilings.items()):
        progress(spec.name, done, len(plan.tilings))
        key = spec.tuning_key
        if key not in known:
            known[key] = measure(spec, tilings)
        entry = decide(known[key].xla_us, known[key].kernel_us)
        tuning.save(folder, "matmul", device, {key: entry}, command)
        progress(spec.name, done + 1, len(plan.tilings))
        yield Tuned(spec=spec, entry=entry)
