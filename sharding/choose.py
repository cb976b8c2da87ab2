"""Choose the schedule that the cost model predicts to be fastest."""

import dataclasses

from jaxinfer.sharding.cost import Prediction, Workload
from jaxinfer.sharding.hamilton import has_decomposition
from jaxinfer.sharding.kinds import build
from jaxinfer.sharding.schedule import Schedule
from jaxinfer.sharding.topology import Topology

# Closer predictions than this are a tie: the model's figures are not known to a thousandth.
TIE = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A schedule and what it was compared with.

    Attributes:
        schedule: The fastest by prediction.
        predictions: Modelled times of every candidate by kind, the simplest kind first.
    """

    schedule: Schedule
    predictions: dict[str, Prediction]

    @property
    def speedup(self) -> float:
        """Modelled time of the plain ring over that of the choice; never below 1."""
        chosen = self.predictions[self.schedule.name].total_s
        return self.predictions["ring"].total_s / chosen


def candidates(topology: Topology) -> dict[str, Schedule]:
    """Every kind that exists on a topology, the simplest to run first."""
    n, per_node = topology.num_ranks, topology.ranks_per_node
    found = {"ring": build("ring", n)}
    if n == 1:
        return found
    if topology.num_nodes > 1 and per_node is not None and has_decomposition(per_node + 1):
        found["multinode"] = build("multinode", n, ranks_per_node=per_node)
    found["all_gather"] = build("all_gather", n)
    if n & (n - 1) == 0 and n <= 1024:
        found["xor"] = build("xor", n)
    found["full_link"] = build("full_link", n)
    return found


def choose(topology: Topology, workload: Workload) -> Choice:
    """Pick the schedule with the least modelled time.

    The ring is always a candidate and wins ties (within 0.1 %), then the kind that is simpler to
    run; so the choice is never predicted to be slower than the ring.

    Args:
        topology: Links between n ranks.
        workload: Attention to be computed.

    Returns:
        The choice with the predictions behind it.

    Example:
        >>> from jaxinfer.sharding.topology import mi300x_mesh, pcie5
        >>> work = Workload(tokens_per_rank=1024, num_heads=32, num_kv_heads=32, head_dim=128)
        >>> choose(mi300x_mesh(8), work).schedule.name, choose(pcie5(8), work).schedule.name
        ('all_gather', 'ring')
    """
    schedules = candidates(topology)
    predictions = {kind: s.predict(topology, workload) for kind, s in schedules.items()}
    limit = min(p.total_s for p in predictions.values()) * (1 + TIE)
    best = next(kind for kind, p in predictions.items() if p.total_s <= limit)
    return Choice(schedule=schedules[best], predictions=predictions)
