"""What TASP (arXiv 2509.26541) measured, beside what the cost model says of the same shapes.

The published speed-ups of its rings over ring attention are means and maxima over a grid of
attention calls on eight GPUs; no single call's time is published, so that only the order of the
numbers, and roughly their size, can be compared. The model's are never measured.
"""

import dataclasses
import itertools
from collections.abc import Callable

from jaxinfer.sharding.cost import Workload
from jaxinfer.sharding.kinds import build
from jaxinfer.sharding.topology import Topology, h100_nvswitch, mi300x_mesh, mi300x_tasp

RANKS = 8
# Rate that the attention kernel reaches; assumed.
H100_FLOPS_PER_S, MI300X_FLOPS_PER_S = 600e12, 300e12
_SHAPES = ((20, 128), (4, 512), (12, 192))  # heads and head dimension


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """Speed-up of TASP's rings over the ring, over the whole grid.

    Attributes:
        system: Eight of these GPUs.
        topology: Links of a model of it.
        flops_per_s: Rate of attention for the model.
        causal: Mask; zigzag placement if there is one.
        mean: Published.
        most: Published.
    """

    system: str
    topology: Callable[[int], Topology]
    flops_per_s: float
    causal: bool
    mean: float
    most: float

    def modelled(self) -> tuple[float, float]:
        """Mean and largest gain that the cost model predicts for the grid."""
        links = self.topology(RANKS)
        ring, rings = build("ring", RANKS), build("hamilton", RANKS)
        gains = [
            ring.predict(links, work).total_s / rings.predict(links, work).total_s
            for work in grid(causal=self.causal, flops_per_s=self.flops_per_s)
        ]
        return sum(gains) / len(gains), max(gains)


def _published(system: str, topology: Callable[[int], Topology], rate: float, *numbers: float):
    full, causal = numbers[:2], numbers[2:]
    for mask, (mean, most) in ((False, full), (True, causal)):
        yield Published(
            system=system, topology=topology, flops_per_s=rate, causal=mask, mean=mean, most=most
        )


PUBLISHED = (
    *_published("H100", h100_nvswitch, H100_FLOPS_PER_S, 1.05, 2.31, 1.08, 2.25),
    *_published("MI300X", mi300x_tasp, MI300X_FLOPS_PER_S, 1.57, 3.58, 1.68, 3.58),
    *_published("MI300X", mi300x_mesh, MI300X_FLOPS_PER_S, 1.57, 3.58, 1.68, 3.58),
)


def grid(*, causal: bool, flops_per_s: float) -> list[Workload]:
    """The calls of the benchmark: S = 3,360·2^i tokens, batch 2^j, at most 10 M tokens in all.

    Args:
        causal: Mask.
        flops_per_s: Rate of attention.
    """
    return [
        Workload(
            tokens_per_rank=3360 * 2**i // RANKS, batch=2**j, num_heads=heads, num_kv_heads=heads,
            head_dim=head_dim, causal=causal, flops_per_s=flops_per_s,
        )
        for (heads, head_dim), i, j in itertools.product(_SHAPES, range(8), range(8))
        if 3360 * 2 ** (i + j) <= 10e6
    ]  # fmt: skip


def table() -> str:
    """Published and modelled gains of the rings over the ring, as a table in Markdown."""
    lines = [
        "| system | mask | published mean | published most | modelled mean | modelled most |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in PUBLISHED:
        mean, most = row.modelled()
        mask = "causal" if row.causal else "full"
        lines.append(
            f"| {row.system}, `{row.topology(RANKS).name}` | {mask} | {row.mean:.2f} | "
            f"{row.most:.2f} | {mean:.2f} | {most:.2f} |"
        )
    return "\n".join(lines)
