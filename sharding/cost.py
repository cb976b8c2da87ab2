"""Modelled time of sequence-parallel attention over a schedule.

The model counts; the rates that it counts with are given, and some of them were measured.
"""

import dataclasses

import numpy as np
import numpy.typing as npt

from jaxinfer.sharding.checks import at_least, positive
from jaxinfer.sharding.topology import Topology


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Attention that each rank takes part in; the query stays, keys and values travel.

    Attributes:
        tokens_per_rank: Tokens of a rank's block, S/n.
        num_heads: N, query heads.
        num_kv_heads: K; divides N.
        head_dim: H.
        batch: B, sequences of this length.
        bytes_per_element: Of keys and values on the wire; 2 for bfloat16.
        causal: Half of the work, shared out evenly (zigzag placement).
        flops_per_s: Rate that the attention kernel reaches, not the peak.
        step_overhead_s: Launch and merge, once per attention call.
        part_s_per_element: What an output element costs once more with each further part of the
            keys that it is merged from, beside the part's operations.

    Raises:
        ValueError: If a count is below 1, a rate not finite and positive, or K does not divide N.
    """

    tokens_per_rank: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    batch: int = 1
    bytes_per_element: float = 2.0
    causal: bool = False
    flops_per_s: float = 600e12
    step_overhead_s: float = 10e-6
    part_s_per_element: float = 0.0

    def __post_init__(self) -> None:
        for field in ("tokens_per_rank", "num_heads", "num_kv_heads", "head_dim", "batch"):
            at_least(field, getattr(self, field), 1)
        positive("bytes_per_element", self.bytes_per_element)
        positive("flops_per_s", self.flops_per_s)
        positive("step_overhead_s", self.step_overhead_s, zero=True)
        positive("part_s_per_element", self.part_s_per_element, zero=True)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads; "
                f"got {self.num_heads} and {self.num_kv_heads}"
            )

    @property
    def block_bytes(self) -> float:
        """Keys and values of one rank."""
        elements = self.batch * self.tokens_per_rank * self.num_kv_heads * self.head_dim
        return 2 * elements * self.bytes_per_element

    @property
    def block_s(self) -> float:
        """Seconds of attention of one rank's queries over one rank's keys (q·k and p·v)."""
        cells = self.batch * self.tokens_per_rank**2 * self.num_heads
        return 4 * cells * self.head_dim / self.flops_per_s / (2 if self.causal else 1)

    @property
    def part_s(self) -> float:
        """Seconds that one more part costs all of a rank's outputs."""
        elements = self.batch * self.tokens_per_rank * self.num_heads * self.head_dim
        return elements * self.part_s_per_element


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """Modelled seconds of one attention layer.

    Attributes:
        communication_s: Per exchange.
        computation_s: Per attention call; one more than exchanges, the own block first.
        total_s: Exchange t runs beside attention t; the last attention runs alone.
    """

    communication_s: tuple[float, ...]
    computation_s: tuple[float, ...]
    total_s: float

    @property
    def exposed_s(self) -> float:
        """Time in which ranks only wait for pieces."""
        return self.total_s - sum(self.computation_s)

    @property
    def compute_to_communication(self) -> float:
        """Ratio of both sums; above 1 communication can hide. Infinite without exchanges."""
        communication = sum(self.communication_s)
        return sum(self.computation_s) / communication if communication else float("inf")


def predict(
    destination: npt.NDArray[np.int32],
    pieces_per_rank: int,
    topology: Topology,
    workload: Workload,
) -> Prediction:
    """Model one attention layer over a schedule.

    A step takes its latency, plus that of its messages, plus the longest of: a piece over one
    link, all that a rank sends or receives within its node over its port, and all that it sends
    or receives from other nodes over its network card. Computation counts floating-point
    operations at a fixed rate. For a ring within one node the ratio of computation to
    communication therefore tends to (S/n)·(N/K)·bandwidth/rate, half of it when causal. What
    the longer of the two does not hide of the shorter is added (`Topology.hidden`).

    Args:
        destination: [steps, n, lanes] as in `Schedule`.
        pieces_per_rank: m; a piece is 1/m of a block.
        topology: Links between n ranks.
        workload: Attention.

    Returns:
        Modelled seconds.

    Raises:
        ValueError: If the topology has another number of ranks.
    """
    steps, num_ranks, lanes = destination.shape
    if topology.num_ranks != num_ranks:
        raise ValueError(
            f"the schedule has {num_ranks} ranks; topology {topology.name!r} has "
            f"{topology.num_ranks}"
        )
    piece_bytes = workload.block_bytes / pieces_per_rank
    communication = tuple(_exchange_s(step, topology, piece_bytes) for step in destination)
    step_s = workload.block_s * lanes / pieces_per_rank
    step_s += workload.step_overhead_s + workload.part_s
    computation = (workload.block_s + workload.step_overhead_s, *[step_s] * steps)
    return overlapped(communication, computation, hidden=topology.hidden)


def overlapped(
    communication: tuple[float, ...], computation: tuple[float, ...], *, hidden: float
) -> Prediction:
    """Exchange t beside attention t; the last attention runs alone.

    Args:
        communication: Seconds of each exchange.
        computation: Of each attention call, one more.
        hidden: As in `Topology`.

    Returns:
        Modelled seconds.
    """
    pairs = zip(communication, computation[:-1], strict=True)
    beside = sum(max(pair) + (1 - hidden) * min(pair) for pair in pairs)
    return Prediction(
        communication_s=communication,
        computation_s=computation,
        total_s=beside + computation[-1],
    )


def _exchange_s(
    destination: npt.NDArray[np.int32], topology: Topology, piece_bytes: float
) -> float:
    """Seconds of one step, destination [n, lanes]."""
    num_ranks, lanes = destination.shape
    per_node = topology.ranks_per_node or num_ranks
    inside = destination // per_node == np.arange(num_ranks)[:, None] // per_node
    port = _busiest(destination, inside)
    nic = _busiest(destination, ~inside)
    wire = max(piece_bytes / topology.link_bytes_per_s if port else 0.0,
               port * piece_bytes / topology.port_bytes_per_s)  # fmt: skip
    latency = topology.latency_s
    if nic:
        assert topology.nic_bytes_per_s is not None  # Topology checks it
        wire = max(wire, nic * piece_bytes / topology.nic_bytes_per_s)
        latency = max(latency, topology.nic_latency_s)
    return latency + lanes * topology.message_s + wire


def _busiest(destination: npt.NDArray[np.int32], chosen: npt.NDArray[np.bool_]) -> int:
    """Most pieces that one rank sends or receives among the chosen ones."""
    received = np.bincount(destination[chosen], minlength=1)
    return int(max(chosen.sum(axis=1).max(initial=0), received.max(initial=0)))
