"""Schedules by name."""

import difflib
from collections.abc import Callable

from jaxinfer.sharding.all_gather import all_gather
from jaxinfer.sharding.full_link import full_link
from jaxinfer.sharding.hamilton import hamilton
from jaxinfer.sharding.multinode import multinode
from jaxinfer.sharding.ring import ring
from jaxinfer.sharding.schedule import Schedule
from jaxinfer.sharding.xor import xor

KINDS: dict[str, Callable[..., Schedule]] = {
    "ring": ring,
    "hamilton": hamilton,
    "full_link": full_link,
    "xor": xor,
    "all_gather": all_gather,
    "multinode": multinode,
}


def build(
    name: str,
    num_ranks: int,
    *,
    ranks_per_node: int | None = None,
    pieces: int | None = None,
) -> Schedule:
    """Build a schedule by the name of its kind.

    Args:
        name: `"ring"`, `"hamilton"`, `"full_link"`, `"xor"`, `"all_gather"` or `"multinode"`.
        num_ranks: n.
        ranks_per_node: g; for `"multinode"`, which needs it, and for no other kind.
        pieces: m; for `"all_gather"` only.

    Returns:
        The schedule; `validate` has not been called.

    Raises:
        ValueError: If the name is unknown, an argument does not belong to the kind, or the kind
            has no schedule for n ranks.

    Example:
        >>> build("ring", 4).num_steps
        3
    """
    if name not in KINDS:
        near = difflib.get_close_matches(name.lower().replace("-", "_"), KINDS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown schedule {name!r}; {hint}known: {', '.join(KINDS)}")
    if (ranks_per_node is not None) != (name == "multinode"):
        need = "needs" if name == "multinode" else "does not take"
        raise ValueError(f"schedule {name!r} {need} ranks_per_node; got {ranks_per_node}")
    if name == "multinode":
        if pieces is not None:
            raise ValueError(f"schedule {name!r} does not take pieces; got {pieces}")
        return KINDS[name](num_ranks, ranks_per_node)
    if name == "all_gather":
        return all_gather(num_ranks, pieces)
    if pieces is not None:
        raise ValueError(f"schedule {name!r} does not take pieces; got {pieces}")
    return KINDS[name](num_ranks)
