"""A picture of what the cost model predicts for sequence parallelism: modelled, never measured.

python -m bench.modelled
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.plot import save
from jaxinfer.sharding.choose import choose
from jaxinfer.sharding.cost import Workload
from jaxinfer.sharding.published import (
    H100_FLOPS_PER_S,
    MI300X_FLOPS_PER_S,
    PUBLISHED,
    RANKS,
)
from jaxinfer.sharding.topology import Topology, h100_nvswitch, mi300x_mesh, mi300x_tasp, pcie5

if TYPE_CHECKING:
    from matplotlib.axes import Axes  # pyright: ignore[reportMissingImports]
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

OUT = Path("docs/plots/modelled/sequence_parallel.svg")
TOKENS = tuple(round(2 ** (i / 4)) for i in range(24, 69))
_TICKS = tuple(2**i for i in range(6, 18, 2))
_TEXT, _FAINT = "#1f2937", "#6b7280"
_INCHES = (800 / 96, 7.2)  # a browser shows 800 pixels


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Heads of attention, and its mask.

    Attributes:
        label: For the legend.
        num_heads: N.
        num_kv_heads: K.
        causal: Mask; zigzag placement if there is one.
        color: Of the line.
    """

    label: str
    num_heads: int
    num_kv_heads: int
    causal: bool
    color: str


SHAPES = tuple(
    Shape(
        label=f"{heads} / {kv_heads} heads, {'causal' if causal else 'full mask'}",
        num_heads=heads, num_kv_heads=kv_heads, causal=causal, color=color,
    )
    for heads, kv_heads, causal, color in (
        (20, 20, False, "#1a56b0"), (20, 20, True, "#7aa5e0"),  # one of TASP's
        (32, 8, False, "#b45309"), (32, 8, True, "#f0a868"),  # Llama-3-8B's
    )
)  # fmt: skip
SYSTEMS: tuple[tuple[str, Callable[[int], Topology], float], ...] = (
    ("modelled: H100 behind NVSwitch", h100_nvswitch, H100_FLOPS_PER_S),
    ("modelled: H100 on PCIe 5.0", pcie5, H100_FLOPS_PER_S),
    ("modelled: full mesh (MI300X), links by data sheet", mi300x_mesh, MI300X_FLOPS_PER_S),
    ("modelled: full mesh (MI300X), links as by TASP", mi300x_tasp, MI300X_FLOPS_PER_S),
)


def gains(topology: Topology, flops_per_s: float, shape: Shape) -> list[float]:
    """Modelled time of the ring by that of the schedule that is chosen, for each of `TOKENS`."""
    return [
        choose(
            topology,
            Workload(
                tokens_per_rank=tokens, num_heads=shape.num_heads, head_dim=128,
                num_kv_heads=shape.num_kv_heads, causal=shape.causal, flops_per_s=flops_per_s,
            ),
        ).speedup
        for tokens in TOKENS
    ]  # fmt: skip


def draw() -> "Figure":
    """Gain over the ring against tokens per rank: a panel per system, a line per shape."""
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    figure = Figure(figsize=_INCHES, facecolor="white")
    title = "MODELLED, not measured: gain of the chosen schedule over ring attention"
    note = (
        f"{RANKS} ranks, one layer of attention, head dimension 128, assumed to run at "
        f"{H100_FLOPS_PER_S / 1e12:.0f} TFLOP/s (H100)\n"
        f"or {MI300X_FLOPS_PER_S / 1e12:.0f} (MI300X). "
        "Dotted: what TASP measured, the mean over its own shapes, full mask."
    )
    figure.text(0.012, 0.985, title, va="top", fontsize=11, weight="bold", color=_TEXT)
    figure.text(0.012, 0.955, note, va="top", color=_FAINT)
    grid = figure.subplots(2, 2)
    figure.subplots_adjust(left=0.065, right=0.985, top=0.86, bottom=0.07, hspace=0.3, wspace=0.13)
    for axes, system in zip(grid.flat, SYSTEMS, strict=True):
        _panel(axes, *system)
    grid[0, 0].legend(frameon=False, loc="upper right", labelcolor=_TEXT)
    for axes in grid[1]:
        axes.set_xlabel("tokens per rank", color=_FAINT)
    for axes in grid[:, 0]:
        axes.set_ylabel("modelled time of the ring / of the choice", color=_FAINT)
    return figure


def _panel(
    axes: "Axes", name: str, topology: Callable[[int], Topology], flops_per_s: float
) -> None:
    links, most = topology(RANKS), 1.0
    for shape in SHAPES:
        line = gains(links, flops_per_s, shape)
        most = max(most, *line)
        axes.plot(TOKENS, line, color=shape.color, linewidth=1.8, label=shape.label)
    for row in PUBLISHED:
        if row.topology is topology and not row.causal:
            axes.axhline(row.mean, color="black", linewidth=0.9, linestyle=":")
            axes.annotate(
                f"published mean {row.mean:.2f}", (TOKENS[-1], row.mean), (0, 3), ha="right",
                textcoords="offset points", color=_TEXT,
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(_TICKS, [f"{t}" if t < 1024 else f"{t // 1024} K" for t in _TICKS])
    axes.set_ylim(0.95, max(most * 1.08, 1.5))
    axes.set_title(name, loc="left", fontsize=9, weight="bold", color=_TEXT)
    axes.text(
        0.5, 0.5, "modelled", transform=axes.transAxes, ha="center", va="center", fontsize=30,
        color="#eef0f3", weight="bold", zorder=0,
    )  # fmt: skip
    for side in axes.spines.values():
        side.set_visible(False)
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=_FAINT)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the picture; 2 where matplotlib is missing."""
    parser = argparse.ArgumentParser(prog="python -m bench.modelled", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help=f"file to write ({OUT})")
    try:
        print(save(draw, parser.parse_args(arguments).out))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
