"""Sequence-parallel schedules: who sends which piece to whom at each step, and what it costs.

Schedules and the cost model are plain numpy. What runs on devices is in `sequence_parallel`; its
names are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxinfer.sharding.choose import Choice, choose
from jaxinfer.sharding.cost import Prediction, Workload
from jaxinfer.sharding.kinds import KINDS, build
from jaxinfer.sharding.schedule import Schedule
from jaxinfer.sharding.topology import TOPOLOGIES, Topology

if TYPE_CHECKING:
    from jaxinfer.sharding.sequence_parallel.decode import (
        merge_over_axis,
        sharded_decode_attention,
    )
    from jaxinfer.sharding.sequence_parallel.placement import (
        count_before,
        padded_length,
        place,
        positions,
        unplace,
    )
    from jaxinfer.sharding.sequence_parallel.plan import Plan, plan
    from jaxinfer.sharding.sequence_parallel.ring import ring_attention
    from jaxinfer.sharding.sequence_parallel.ulysses import ulysses_attention
    from jaxinfer.sharding.sequence_parallel.whole import sequence_parallel_attention

_MODULES = {
    "decode": ("merge_over_axis", "sharded_decode_attention"),
    "placement": ("count_before", "padded_length", "place", "positions", "unplace"),
    "plan": ("Plan", "plan"),
    "ring": ("ring_attention",),
    "ulysses": ("ulysses_attention",),
    "whole": ("sequence_parallel_attention",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "KINDS",
    "TOPOLOGIES",
    "Choice",
    "Plan",
    "Prediction",
    "Schedule",
    "Topology",
    "Workload",
    "build",
    "choose",
    "count_before",
    "merge_over_axis",
    "padded_length",
    "place",
    "plan",
    "positions",
    "ring_attention",
    "sequence_parallel_attention",
    "sharded_decode_attention",
    "ulysses_attention",
    "unplace",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"jaxinfer.sharding.sequence_parallel.{_HOME[name]}")
    value = getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
