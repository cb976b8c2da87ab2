"""From measured rows to the tables that choosers read: `pallas_kernels/data/<device>/<op>.json`."""

from pathlib import Path
from typing import Any

from bench import rows
from bench.cases import flat_matmul
from jaxinfer.pallas_kernels import tuning
from jaxinfer.pallas_kernels.decision import decide
from jaxinfer.pallas_kernels.device import current_device
from jaxinfer.pallas_kernels.matmul.config import least_gain_us
from jaxinfer.pallas_kernels.matmul.shape import Config
from jaxinfer.pallas_kernels.matmul.specs import SPECS

DATA = Path(__file__).parent.parent / "pallas_kernels" / "data"
COMMAND = "python -m bench run --op flat_matmul --save && python -m bench tune"


def tune_matmul(measured: list[rows.Row]) -> dict[str, dict[str, Any]]:
    """What is chosen for every measured product, by the chooser's key.

    Models that share a product share the key: of their cases, the one with the most tilings counts.
    """
    specs = {spec.name: spec for spec in SPECS}
    xla_us: dict[str, float] = {}
    kernel_us: dict[str, dict[Config, float]] = {}
    for row in measured:
        case, name = row["case"], row["implementation"]
        if name == "xla":
            xla_us[case] = row["median_us"]
        elif name in flat_matmul.TILINGS:
            config = flat_matmul.tiling(specs[case], name)
            assert config is not None, "it was measured"
            kernel_us.setdefault(case, {})[config] = row["median_us"]
    chosen: dict[str, str] = {}  # cases by key
    for case in xla_us:
        if case in kernel_us:
            other = chosen.setdefault(specs[case].tuning_key, case)
            if len(kernel_us[case]) > len(kernel_us[other]):
                chosen[specs[case].tuning_key] = case
    return {
        key: decide(
            xla_us[case],
            kernel_us[case],
            least_gain_us=least_gain_us(K=specs[case].K, N=specs[case].N),
        )
        for key, case in chosen.items()
    }


def write(folder: Path = DATA) -> Path:
    """Put what this device's committed rows say into its table; the table's path.

    Raises:
        ValueError: nothing was measured on this device.
    """
    device = current_device()
    measured = rows.load(rows.results_of(device, "flat_matmul"))
    if not measured:
        raise ValueError(f"no rows of flat_matmul on {device.name}; first run: {COMMAND}")
    return tuning.save(folder, "matmul", device, tune_matmul(measured), COMMAND, keep=False)
