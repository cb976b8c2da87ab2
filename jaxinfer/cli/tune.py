"""`jaxinfer tune`: measure which implementation and tiling suit a model's products here."""

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

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
jaxinfer tune llama-3-8b --json
jaxinfer tune Qwen/Qwen3-8B --dtype float16
jaxinfer tune model.gguf --out tuning
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tune(Output):
    """Measure on this GPU which implementation suits each product of a model, and keep it.

    For 1, 8, 16, 32, 64 and 128 tokens, XLA competes with the kernel's tilings on random weights;
    the kernel is chosen where it is faster by more than 1 %. All commands then choose by what was
    measured. Ctrl-C keeps what there is.
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
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """Of weights and tokens; what is chosen holds for both."""
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
        plan = self._plan(device, reporter)
        tuned = self._measure(plan, device, folder, reporter)
        self._print(tuned, device, folder / device.key / "matmul.json")
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

    def _plan(self, device: "DeviceSpec", reporter: Reporter) -> "Plan":
        from jaxinfer.autotune.products import model_config, products
        from jaxinfer.autotune.tune import Plan

        interrupts.work_begins()
        with reporter.task("download", unit="bytes", quiet=True, late=True) as progress:
            config = model_config(self.model, progress)
        plan = Plan.of(products(config, name=self.model, dtype=self.dtype), device)
        for spec in plan.refused:
            reporter.note(f"{spec.name}: XLA, the kernel cannot compute it")
        if not plan.tilings:
            raise UsageError(f"the kernel can compute no product of {self.model}: all are XLA's")
        return plan

    def _measure(
        self, plan: "Plan", device: "DeviceSpec", folder: Path, reporter: Reporter
    ) -> list["Tuned"]:
        from jaxinfer.autotune.tune import tune

        count, tuned = len(plan.tilings), []
        reporter.note(f"{count} products on {device.name}, about {plan.seconds / 60:.0f} min")
        try:
            with reporter.task("tune", unit="products", foresee=True) as progress:
                found = tune(
                    plan, device, folder=folder, command=f"jaxinfer tune {self.model}",
                    progress=progress,
                )  # fmt: skip
                for one in found:
                    tuned.append(one)
        except BaseException:
            file = folder / device.key / "matmul.json"
            kept = f"are kept in {file}" if tuned else "were measured; nothing is written"
            reporter.note(f"{len(tuned)} of {count} products {kept}")
            raise
        return tuned

    def _print(self, tuned: list["Tuned"], device: "DeviceSpec", file: Path) -> None:
        from jaxinfer.autotune import report

        if self.json:
            rows = [
                {"part": t.spec.part, "M": t.spec.M, "K": t.spec.K, "N": t.spec.N, **t.entry}
                for t in tuned
            ]
            values = {"model": self.model, "device": device.name, "file": str(file)}
            print(json.dumps(values | {"kernel_for": report.by_part(tuned), "products": rows}))
            return
        lines = [report.HEADING, "", *report.table(tuned), "", report.CROSSOVERS, ""]
        print("\n".join([*lines, *report.crossovers(tuned), "", f"written to {file}"]))
        if self.out is not None:
            print(f"read where JAXINFER_TUNING={self.out.absolute()}")


def _hopper() -> "DeviceSpec":
    """This machine's device.

    Raises:
        UsageError: the kernel does not run here, so that nothing is to be chosen.
    """
    import jax

    from jaxinfer.pallas_kernels import plgpu
    from jaxinfer.pallas_kernels.device import current_device

    device = current_device()
    if not device.is_hopper:
        raise UsageError(
            "tune needs a Hopper GPU (compute capability 9.0), for which the kernel is made; this "
            f"machine's device is {device.name!r}, where XLA is always taken"
        )
    if not plgpu.lowers_transposed_stores():
        raise UsageError(f"tune needs JAX 0.11; with JAX {jax.__version__} XLA is always taken")
    return device
