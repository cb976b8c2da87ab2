"""What was chosen, from which number of tokens on, and what it gains over a static choice."""

from collections.abc import Sequence

from jaxinfer.autotune.tune import Tuned
from jaxinfer.pallas_kernels.matmul.config import BUCKETS

HEADING = """\
M: tokens; each line stands for the numbers of tokens since the line before. Gain: time that always
taking XLA, or always the kernel, would need beyond that of the choice."""
CROSSOVERS = """\
M1: from here on the flat kernel; M2: from here on XLA. There is no GEMV kernel: where M1 = 1, the
flat kernel takes its place."""


def kernel_ranges(tuned: Sequence[Tuned]) -> list[tuple[int, int]]:
    """First and last M of every range in which the kernel was chosen for one product.

    A product that was measured at M stands for those below it, down to the next smaller bucket.
    """
    ranges: list[tuple[int, int]] = []
    for one in sorted(tuned, key=lambda one: one.spec.M):
        if not one.is_kernel:
            continue
        place = BUCKETS.index(one.spec.M)
        first = BUCKETS[place - 1] + 1 if place else 1
        if ranges and ranges[-1][1] == first - 1:
            first = ranges.pop()[0]
        ranges.append((first, one.spec.M))
    return ranges


def by_part(tuned: Sequence[Tuned]) -> dict[str, list[tuple[int, int]]]:
    """For every part of the model, where the kernel was chosen; see `kernel_ranges`."""
    parts: dict[str, list[Tuned]] = {}
    for one in tuned:
        parts.setdefault(one.spec.part, []).append(one)
    return {part: kernel_ranges(some) for part, some in parts.items()}


def crossovers(tuned: Sequence[Tuned]) -> list[str]:
    """A line for every part of the model: where the kernel begins and ends to be chosen."""
    parts = by_part(tuned)
    width = max(map(len, parts), default=0)
    return [f"{part:{width}}  {_words(ranges)}" for part, ranges in parts.items()]


def _words(ranges: list[tuple[int, int]]) -> str:
    if not ranges:
        return "XLA for all M"
    where = " and ".join(f"{a} to {b}" if a < b else f"{a}" for a, b in ranges)
    points = ""
    if len(ranges) == 1:
        ((first, last),) = ranges
        points = f" (M1 = {first}, M2 = {last + 1})"
    return f"flat kernel for M = {where}, else XLA{points}"


def table(tuned: Sequence[Tuned]) -> list[str]:
    """A line for every product, and for the products of a layer together where all are there."""
    parts = list(dict.fromkeys(one.spec.part for one in tuned))
    rows = [
        (part, one.spec.M, _name(one), one.us, one.xla_us, one.kernel_us)
        for part in parts
        for one in tuned
        if one.spec.part == part
    ]
    for M in sorted({one.spec.M for one in tuned}):
        some = [one for one in tuned if one.spec.M == M]
        if len(some) == len(parts) > 1:
            us = sum(one.us for one in some)
            xla_us, kernel_us = sum(one.xla_us for one in some), sum(one.kernel_us for one in some)
            rows.append(("layer", M, "", us, xla_us, kernel_us))
    shape = "{:8} {:>4}  {:22} {:>9} {:>9} {:>9} {:>9} {:>12}"
    titles = ("product", "M", "chosen", "µs", "XLA µs", "kernel µs", "over XLA", "over kernel")
    lines = [shape.format(*titles)]
    for part, M, name, us, xla_us, kernel_us in rows:
        lines.append(
            shape.format(
                part, M, name, f"{us:.1f}", f"{xla_us:.1f}", f"{kernel_us:.1f}",
                _gain(xla_us, us), _gain(kernel_us, us),
            )
        )  # fmt: skip
    return [line.rstrip() for line in lines]


def _name(one: Tuned) -> str:
    if not one.is_kernel:
        return "XLA"
    tiling = one.entry["config"]
    return (
        f"kernel {tiling['block_n']}x{tiling['block_k']}, {tiling['stages']} deep"
        + ", paired" * (tiling["cluster"] > 1)
    )


def _gain(static_us: float, us: float) -> str:
    return f"{100 * (static_us / us - 1):.1f} %"
