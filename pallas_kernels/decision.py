"""From measured times to an entry of tuning data, and from an entry to what an op does."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

NOISE = 0.01
"""Medians of one call that differ by less, as a share, count as equal: XLA is then taken."""

_IMPLEMENTATIONS = ("mosaic", "xla")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Preference[C]:
    """How to compute a call.

    Attributes:
        order: Implementations in order of preference.
        config: Tiling of the kernel; None if there is none, which means what the op says.
        slower_us: By how much the kernel is slower than XLA, if that was measured.
    """

    order: tuple[str, ...]
    config: C | None
    slower_us: float = 0.0


def decide(
    xla_us: float, kernel_us: Mapping[Any, float], *, least_gain_us: float = 0.0
) -> dict[str, Any]:
    """The kernel where it is faster than XLA by more than `NOISE` and `least_gain_us`, else XLA.

    Args:
        xla_us: Median time of XLA, µs.
        kernel_us: The kernel's, by tiling, a dataclass; empty if it cannot serve the call.
        least_gain_us: What it must save besides, µs; less than 0: what it may take longer.

    Returns:
        `implementation`; `us`, the times of XLA and of the best tiling; and `config`, that tiling,
        also where XLA is taken: for calls that name the kernel.
    """
    if not kernel_us:
        return {"implementation": "xla", "us": {"xla": _digits(xla_us)}}
    best = min(kernel_us, key=lambda config: kernel_us[config])
    faster = kernel_us[best] + least_gain_us < (1 - NOISE) * xla_us
    return {
        "implementation": "mosaic" if faster else "xla",
        "config": dataclasses.asdict(best),
        "us": {"xla": _digits(xla_us), "mosaic": _digits(kernel_us[best])},
    }


def parse[C](
    entry: dict[str, Any],
    make: Callable[..., C],
    *,
    default: C | None,
    check: Callable[[C], None],
) -> Preference[C]:
    """What `decide` made, read from tuning data, which anyone may have edited.

    Args:
        entry: Of the data.
        make: The tiling's class; all its fields are integers.
        default: The tiling of an entry without one.
        check: Raises ValueError for a tiling that does not suit the call.

    Raises:
        KeyError, OverflowError, TypeError, ValueError: it cannot be used.
    """
    implementation, config = entry["implementation"], default
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {_IMPLEMENTATIONS}; got {implementation!r}"
        )
    if (fields := entry.get("config")) is not None:
        config = make(**fields)
        if any(type(size) is not int for size in fields.values()):
            raise TypeError(f"config must hold integers; got {fields}")
        check(config)
    us = dict(entry.get("us", {}))
    slower = float(us["mosaic"]) - float(us["xla"]) if {"mosaic", "xla"} <= us.keys() else 0.0
    order = ("mosaic", "xla") if implementation == "mosaic" else ("xla",)
    return Preference(order=order, config=config, slower_us=slower)


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
