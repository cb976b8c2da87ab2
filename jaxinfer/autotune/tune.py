"""Measure a model's calls of an op one after another; what was measured is kept at once."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxinfer.autotune.measure import Times, measure
from jaxinfer.autotune.op import Op
from jaxinfer.pallas_kernels import tuning
from jaxinfer.pallas_kernels.decision import decide
from jaxinfer.pallas_kernels.device import DeviceSpec
from jaxinfer.progress import Progress


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tuned:
    """What was found for one call.

    Attributes:
        spec: The call.
        entry: As `decide` made it of the times.
        heuristic_us: Time of what is taken where nothing was measured, µs.
    """

    spec: Any
    entry: dict[str, Any]
    heuristic_us: float

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
    """What there is to measure of one op.

    Attributes:
        op: It.
        tilings: By call, those of the kernel that compete with XLA.
        refused: Calls that the kernel cannot serve, and for which XLA is taken.
        skipped: Why a call is not measured; the heuristic decides.
    """

    op: Op[Any, Any]
    tilings: dict[Any, list[Any]]
    refused: list[Any]
    skipped: dict[Any, str]

    @classmethod
    def of(cls, op: Op[Any, Any], specs: Sequence[Any], device: DeviceSpec) -> "Plan":
        """The plan for calls of an op on a device."""
        tilings = {spec: op.candidates(device, spec) for spec in specs}
        served = [spec for spec in specs if tilings[spec]]
        skipped = {spec: why for spec in served if (why := op.too_large(spec))}
        return cls(
            op=op,
            tilings={spec: tilings[spec] for spec in served if spec not in skipped},
            refused=[spec for spec in specs if not tilings[spec]],
            skipped=skipped,
        )

    @property
    def seconds(self) -> float:
        """About how long it will take."""
        return self.op.seconds * sum(1 + len(some) for some in self.tilings.values())


def tune(
    plan: Plan,
    device: DeviceSpec,
    *,
    folder: Path,
    command: str,
    progress: Progress,
) -> Iterator[Tuned]:
    """Measure a plan's calls, and yield each when it is in the device's tuning data.

    Args:
        plan: What to measure.
        device: That of this process; its key names the data.
        folder: For the data, as in `tuning.save`.
        command: For the file.
        progress: Called with (call, calls done, calls in all).

    Raises:
        OSError: the file cannot be written.
        WrongResult: an implementation computes something else.
    """
    op = plan.op
    known: dict[str, Times[Any]] = {}  # two products of a model may be alike
    for done, (spec, tilings) in enumerate(plan.tilings.items()):
        progress(spec.name, done, len(plan.tilings))
        key = spec.tuning_key
        if key not in known:
            with tuning.being_made():
                known[key] = measure(op, spec, tilings)
        times = known[key]
        entry = decide(times.xla_us, times.kernel_us, least_gain_us=op.least_gain_us(spec))
        tuning.save(folder, op.name, device, {key: entry}, command)
        progress(spec.name, done + 1, len(plan.tilings))
        unmeasured = op.heuristic(device, spec)
        us = times.xla_us if unmeasured is None else times.kernel_us[unmeasured]
        yield Tuned(spec=spec, entry=entry, heuristic_us=us)
