"""From measured times to an entry of tuning data; see `config.choose_config` for its reader."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxinfer.pallas_kernels.matmul.mosaic_sm90 import Config

NOISE = 0.01
"""Medians of one product that differ by less, as a share, count as equal: XLA is then taken."""


def decide(xla_us: float, kernel_us: Mapping[Config, float]) -> dict[str, Any]:
    """The kernel where it is faster than XLA by more than `NOISE`, else XLA.

    Args:
        xla_us: Median time of XLA, µs.
        kernel_us: The kernel's, by tiling; empty if it cannot compute the product.

    Returns:
        `implementation`; `us`, the times of XLA and of the best tiling; and `config`, that tiling,
        also where XLA is taken: for calls that name the kernel.
    """
    if not kernel_us:
        return {"implementation": "xla", "us": {"xla": _digits(xla_us)}}
    best = min(kernel_us, key=lambda config: kernel_us[config])
    faster = kernel_us[best] < (1 - NOISE) * xla_us
    return {
        "implementation": "mosaic" if faster else "xla",
        "config": dataclasses.asdict(best),
        "us": {"xla": _digits(xla_us), "mosaic": _digits(kernel_us[best])},
    }


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
