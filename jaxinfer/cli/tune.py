"""`jaxinfer tune`: measure which implementations and tilings suit a model here."""

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from jaxinfer.cli import interrupts
from jaxinfer.cli.errors import UsageError
from jaxinfer.cli.options import Output
from jaxinfer.progress import Reporter

if TYPE_CHECKING:
    from jaxinfer.autotune.tune import Plan, Tuned
    from jaxinfer.pallas_kernels.device import DeviceSpec

EXAMPLES = """
jaxinfer tune default
jaxinfer tune llama-3-8b --op decode_attention
jaxinfer tune llama-3-8b --json
jaxinfer tune Qwen/Qwen3-8B --dtype float16
jaxinfer tune model.gguf --out tuning
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tune(Output):
    """Measure on this GPU which implementation suits each product of a model, and keep it.

    The same for attention to a KV cache in decoding. XLA competes with the kernels' tilings on
    random data: products of 1, 8, 16, 32, 64 and 128 tokens, and attention of 1, 8 and 64 requests
    with room for 1024 to 131072 tokens each. A kernel is chosen where it is faster by more than
    1 %. All commands then choose by what was measured. Ctrl-C keeps what there is.
    """

    model: Annotated[
        Positional[str],
        arg(
            metavar="MODEL",
            help='GGUF file, model directory, Hugging Face Hub id, "default", "llama-3-8b" or '
            '"llama-2-7b". Only its shape is used; of a repository on the Hub, config.json alone '
            "is fetched.",
        ),
    ]
    op: Literal["all", "matmul", "decode_attention"] = "all"
    """What to measure: products, attention in decoding, or both."""
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """Of weights, tokens and cache; what is chosen holds for both."""
    out: Annotated[
        Path | None,
        arg(
            metavar="DIR",
            help_behavior_hint="(default: where it is read)",
            help="Folder for the tuning data. It is read from $JAXINFER_TUNING, else from tuning "
            "in the cache folder.",
        ),
    ] = None
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        """Do it; the exit code."""
        from jaxinfer.cli.loading import find_devices

        find_devices()
        device = _hopper()
        folder = self._folder()
        reporter = self.reporter()
        found = {}
        for plan in self._plans(device, reporter):
            name = plan.op.name
            found[name] = self._measure(plan, device, folder, reporter)
            if not self.json:
                self._print(name, found[name], folder / device.key / f"{name}.json")
        if self.json:
            print(json.dumps(self._as_json(found, device, folder)))
        elif self.out is not None:
            print(f"read where JAXINFER_TUNING={self.out.absolute()}")
        return 0

    def _folder(self) -> Path:
        """Where the data go; made, and found to be writable, before anything is measured."""
        from jaxinfer.folders import tuning_dir

        folder = self.out or tuning_dir()
        if folder is None:
            raise UsageError(
                "JAXINFER_TUNING is empty, or there is no home: name a folder by --out"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot make the folder {folder}: {error.strerror}") from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UsageError(f"cannot write into {folder}")
        return folder

    def _plans(self, device: "DeviceSpec", reporter: Reporter) -> list["Plan"]:
        from jaxinfer.autotune.ops import OPS
        from jaxinfer.autotune.products import model_config
        from jaxinfer.autotune.tune import Plan

        interrupts.work_begins()
        with reporter.task("download", unit="bytes", quiet=True, late=True) as progress:
            config = model_config(self.model, progress)
        plans = []
        for op in OPS.values() if self.op == "all" else [OPS[self.op]]:
            plan = Plan.of(op, op.specs(config, model=self.model, dtype=self.dtype), device)
            for spec in plan.refused:
                reporter.note(f"{op.name} {spec.name}: XLA, the kernel cannot serve it")
            for spec, why in plan.skipped.items():
                reporter.note(f"{op.name} {spec.name}: not measured, {why}")
            plans += [plan] if plan.tilings else []
        if not plans:
            what = "" if self.op == "all" else f" of {self.op}"
            raise UsageError(f"the kernels can serve no call{what} of {self.model}: all are XLA's")
        return plans

    def _measure(
        self, plan: "Plan", device: "DeviceSpec", folder: Path, reporter: Reporter
    ) -> list["Tuned"]:
        from jaxinfer.autotune.tune import tune

        count, unit, name = len(plan.tilings), plan.op.unit, plan.op.name
        minutes = plan.seconds / 60
        reporter.note(f"{count} {unit} of {name} on {device.name}, about {minutes:.0f} min")
        command = f"jaxinfer tune {self.model}" + ("" if self.op == "all" else f" --op {self.op}")
        tuned = []
        try:
            with reporter.task(f"tune {name}", unit=unit, foresee=True) as progress:
                for one in tune(plan, device, folder=folder, command=command, progress=progress):
                    tuned.append(one)
        except BaseException:
            file = folder / device.key / f"{name}.json"
            kept = f"are kept in {file}" if tuned else "were measured; nothing is written"
            reporter.note(f"{len(tuned)} of {count} {unit} of {name} {kept}")
            raise
        return tuned

    def _print(self, op: str, tuned: list["Tuned"], file: Path) -> None:
        from jaxinfer.autotune import report

        print("\n".join([f"# {op}", *report.lines(op, tuned), "", f"written to {file}", ""]))

    def _as_json(
        self, found: dict[str, list["Tuned"]], device: "DeviceSpec", folder: Path
    ) -> dict[str, Any]:
        from jaxinfer.autotune import report
        from jaxinfer.autotune.ops import OPS

        return {
            "model": self.model,
            "device": device.name,
            "ops": {
                op: {
                    "file": str(folder / device.key / f"{op}.json"),
                    **report.summary(op, tuned),
                    OPS[op].unit: [
                        OPS[op].sizes(t.spec) | t.entry | {"heuristic_us": t.heuristic_us}
                        for t in tuned
                    ],
                }
                for op, tuned in found.items()
            },
        }


def _hopper() -> "DeviceSpec":
    """This machine's device.

    Raises:
        UsageError: the kernel does not run here, so that nothing is to be chosen.
    """
    from jaxinfer.pallas_kernels.device import current_device

    device = current_device()
    if not device.is_hopper:
        raise UsageError(
            "tune needs a Hopper GPU (compute capability 9.0), for which the kernel is made; this "
            f"machine's device is {device.name!r}, where XLA is always taken"
        )
    return device
