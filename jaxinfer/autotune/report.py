"""What was chosen, where, and what it gains over static choices."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxinfer.autotune.products import HEAD
from jaxinfer.autotune.tune import Tuned
from jaxinfer.pallas_kernels.matmul.config import BUCKETS

_GAIN = """\
Gain: time that always taking XLA, or always the kernel with its best tiling, or what is taken where
nothing was measured (the heuristic), would need beyond that of the choice."""
PRODUCTS = f"""\
M: tokens; each line stands for the numbers of tokens since the line before.
{_GAIN}"""
CROSSOVERS = """\
M1: from here on the flat kernel; M2: from here on XLA. There is no GEMV kernel: where M1 = 1, the
flat kernel takes its place."""
CALLS = f"""\
B: requests; S: tokens that the page table has room for; w: keys that a layer with a sliding window
sees before a query's own. Each line stands for what lies below it, down to the next B and S. Timed
with all lengths at S.
{_GAIN}"""


def lines(op: str, tuned: Sequence[Tuned]) -> list[str]:
    """The report on an op."""
    if op == "matmul":
        return [PRODUCTS, "", *products(tuned), "", CROSSOVERS, "", *crossovers(tuned)]
    return [CALLS, "", *calls(tuned), "", *where_xla(tuned)]


def summary(op: str, tuned: Sequence[Tuned]) -> dict[str, Any]:
    """Where the kernel was chosen, as JSON values, if that is more than the entries say."""
    return {"kernel_for": by_part(tuned)} if op == "matmul" else {}


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


def products(tuned: Sequence[Tuned]) -> list[str]:
    """A line for every product, and for those of a layer together where all are there."""
    parts = list(dict.fromkeys(one.spec.part for one in tuned))
    ordered = [one for part in parts for one in tuned if one.spec.part == part]
    rows = [((one.spec.part, one.spec.M), _name(one, _product_tiling), [one]) for one in ordered]
    for M in sorted({one.spec.M for one in tuned}):
        some = [one for one in tuned if one.spec.M == M and one.spec.part != HEAD]
        if len(some) == len(set(parts) - {HEAD}) > 1:
            rows.append((("layer", M), "", some))
    return _table(("product", "M"), rows)


def calls(tuned: Sequence[Tuned]) -> list[str]:
    """A line for every call of decode attention."""
    rows = []
    for one in tuned:
        window = one.spec.local_window_size
        labels = (one.spec.B, one.spec.S, "" if window is None else window)
        rows.append((labels, _name(one, _call_tiling), [one]))
    return _table(("B", "S", "w"), rows)


def where_xla(tuned: Sequence[Tuned]) -> list[str]:
    """One line: where XLA was chosen for decode attention, by the keys of the entries."""
    slower = [one.spec.tuning_key for one in tuned if not one.is_kernel]
    if not slower:
        return ["the kernel for all that was measured"]
    if len(slower) == len(tuned):
        return ["XLA for all that was measured"]
    return [f"XLA for {', '.join(slower)}; else the kernel"]


_Row = tuple[tuple[Any, ...], str, Sequence[Tuned]]


def _table(labels: tuple[str, ...], rows: Sequence[_Row]) -> list[str]:
    """A line for every row, whose times are the sums of its measurements."""
    titles = ("µs", "XLA µs", "kernel µs", "over XLA", "over kernel", "over heuristic")
    table: list[tuple[str, ...]] = [(*labels, "chosen", *titles)]
    for label, chosen, some in rows:
        us, xla_us = sum(one.us for one in some), sum(one.xla_us for one in some)
        kernel_us = sum(one.kernel_us for one in some)
        heuristic_us = sum(one.heuristic_us for one in some)
        times = (f"{time:.1f}" for time in (us, xla_us, kernel_us))
        gains = (f"{100 * (time / us - 1):.1f} %" for time in (xla_us, kernel_us, heuristic_us))
        table.append((*map(str, label), chosen, *times, *gains))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    # Names begin where their titles do; numbers end there.
    left = {labels.index("product")} if "product" in labels else set()
    left.add(len(labels))
    return [
        "  ".join(
            f"{cell:{'<' if i in left else '>'}{width}}"
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]


def _name(one: Tuned, words: Callable[[dict[str, int]], str]) -> str:
    return words(one.entry["config"]) if one.is_kernel else "XLA"


def _product_tiling(tiling: dict[str, int]) -> str:
    shared = f", depth by {tiling['split']}" if tiling["split"] > 1 else ""
    paired = ", paired" if tiling["cluster"] > 1 else ""
    return (
        f"kernel {tiling['block_n']}x{tiling['block_k']}, {tiling['stages']} deep{paired}{shared}"
    )


def _call_tiling(tiling: dict[str, int]) -> str:
    return f"kernel {tiling['block']}, {tiling['stages']} deep"
