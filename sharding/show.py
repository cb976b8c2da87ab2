"""Draw a schedule and the times that the cost model predicts for it.

python -m jaxinfer.sharding.show --ranks 8 --schedule hamilton
python -m jaxinfer.sharding.show --ranks 6 --schedule full_link --out rings.svg
python -m jaxinfer.sharding.show --ranks 8 --predict mi300x-mesh --heads 20 --kv-heads 20
python -m jaxinfer.sharding.show --published
"""

import argparse
import contextlib
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxinfer.sharding.choose import choose
from jaxinfer.sharding.cost import Workload
from jaxinfer.sharding.draw_svg import svg
from jaxinfer.sharding.draw_text import describe
from jaxinfer.sharding.kinds import KINDS, build
from jaxinfer.sharding.published import table as published_table
from jaxinfer.sharding.topology import TOPOLOGIES, Topology, h100_nodes


def parser() -> argparse.ArgumentParser:
    """Command-line arguments."""
    arguments = argparse.ArgumentParser(
        prog="python -m jaxinfer.sharding.show",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = arguments.add_argument
    add("--ranks", type=int, default=8, help="number of ranks (8)")
    add("--schedule", help=f"one of {', '.join(KINDS)} (hamilton)")
    add("--ranks-per-node", type=int, help="for multinode, and for --predict h100-nodes (8)")
    add("--pieces", type=int, help="pieces per rank, for all_gather")
    add("--steps", type=int, help="steps to draw (all, or one if all are alike)")
    add("--out", type=Path, help="write an SVG picture here, into a file ending in .svg")
    predict = arguments.add_argument_group("prediction (modelled, never measured)")
    add = predict.add_argument
    add("--predict", metavar="TOPOLOGY", help=f"table for one of {', '.join(TOPOLOGIES)}")
    add("--tokens", type=int, nargs="+", help="tokens per rank (256 1024 4096 16384)")
    add("--heads", type=int, help="query heads (32)")
    add("--kv-heads", type=int, help="KV heads (8)")
    add("--head-dim", type=int, help="head dimension (128)")
    add("--causal", action="store_true", default=None, help="causal mask, zigzag placement")
    add("--tflops", type=float, help="rate that the attention kernel reaches (600)")
    add("--published", action="store_true", help="table of TASP's numbers beside the model's")
    return arguments


def find_topology(name: str, num_ranks: int, ranks_per_node: int | None = None) -> Topology:
    """Stated topology by name.

    Raises:
        ValueError: If the name is unknown, or `ranks_per_node` is given for a single node.
    """
    if name not in TOPOLOGIES:
        near = difflib.get_close_matches(name.lower().replace("_", "-"), TOPOLOGIES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown topology {name!r}; {hint}known: {', '.join(TOPOLOGIES)}")
    if ranks_per_node is None:
        return TOPOLOGIES[name](num_ranks)
    if name != "h100-nodes":
        raise ValueError(f"topology {name!r} is one node; it does not take ranks_per_node")
    return h100_nodes(num_ranks, ranks_per_node)


def prediction_table(topology: Topology, workloads: Sequence[Workload]) -> str:
    """Modelled milliseconds of each candidate, the choice, and its gain over the ring."""
    choices = [choose(topology, workload) for workload in workloads]
    kinds = list(choices[0].predictions)
    lines = [
        f"{topology.name}, {topology.num_ranks} ranks; modelled ms of one attention layer",
        f"({topology.basis})",
        "| tokens per rank | " + " | ".join(kinds) + " | choice | gain over ring |",
        "|---:" * (len(kinds) + 1) + "|---|---:|",
    ]
    for workload, choice in zip(workloads, choices, strict=True):
        times = " | ".join(f"{choice.predictions[kind].total_s * 1e3:.3f}" for kind in kinds)
        lines.append(
            f"| {workload.tokens_per_rank} | {times} | {choice.schedule.name} | "
            f"{choice.speedup:.2f}x |"
        )
    return "\n".join(lines)


def render(options: argparse.Namespace) -> str:
    """Do what the command line asks for and return what to print.

    Raises:
        ValueError: If an argument does not fit, or belongs to the other use of the command, or the
            picture cannot be written.
    """
    drawing = ("schedule", "pieces", "steps", "out")
    predicting = ("tokens", "heads", "kv_heads", "head_dim", "causal", "tflops")
    if options.published:
        given = [n for n in (*drawing, "predict", *predicting) if getattr(options, n) is not None]
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')} has no meaning with --published")
        return published_table()
    for name in drawing if options.predict is not None else predicting:
        if getattr(options, name) is not None:
            without = "with" if options.predict is not None else "without"
            raise ValueError(f"--{name.replace('_', '-')} has no meaning {without} --predict")
    return _draw(options) if options.predict is None else _predict(options)


def _draw(options: argparse.Namespace) -> str:
    if options.steps is not None and options.steps < 1:
        raise ValueError(f"--steps must be at least 1; got {options.steps}")
    if options.out is not None:
        _check_out(options.out)
    schedule = build(
        options.schedule or "hamilton",
        options.ranks,
        ranks_per_node=options.ranks_per_node,
        pieces=options.pieces,
    )
    schedule.validate()
    text = describe(schedule, options.steps)
    if options.out is not None:
        try:
            options.out.write_text(svg(schedule), encoding="utf-8")
        except OSError as error:
            raise ValueError(f"--out {options.out}: {error.strerror}") from error
        text += f"\n\nwrote {options.out}"
    return text


def _check_out(path: Path) -> None:
    if path.suffix.lower() != ".svg":  # what is in the file is SVG, whatever its name
        raise ValueError(f"--out must end in .svg; got {str(path)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"--out {path}: there is no folder {path.parent}")


def _predict(options: argparse.Namespace) -> str:
    topology = find_topology(options.predict, options.ranks, options.ranks_per_node)
    given = {
        "num_heads": (options.heads, 32),
        "num_kv_heads": (options.kv_heads, 8),
        "head_dim": (options.head_dim, 128),
        "causal": (options.causal, False),
    }
    chosen = {name: value if value is not None else other for name, (value, other) in given.items()}
    rate = 600.0 if options.tflops is None else options.tflops
    tokens = options.tokens or [256, 1024, 4096, 16384]
    workloads = [Workload(tokens_per_rank=t, flops_per_s=rate * 1e12, **chosen) for t in tokens]
    return prediction_table(topology, workloads)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 2 for what does not fit, 1 if nobody reads on."""
    try:
        print(render(parser().parse_args(arguments)), flush=True)
    except BrokenPipeError:  # as of `| head`; Python would complain at its end
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
