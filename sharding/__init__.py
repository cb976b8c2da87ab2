"""Sequence-parallel schedules: who sends which piece to whom at each step, and what it costs."""

from jaxinfer.sharding.choose import Choice, choose
from jaxinfer.sharding.cost import Prediction, Workload
from jaxinfer.sharding.kinds import KINDS, build
from jaxinfer.sharding.schedule import Schedule
from jaxinfer.sharding.topology import TOPOLOGIES, Topology

__all__ = [
    "KINDS",
    "TOPOLOGIES",
    "Choice",
    "Prediction",
    "Schedule",
    "Topology",
    "Workload",
    "build",
    "choose",
]
