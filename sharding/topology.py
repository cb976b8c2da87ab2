"""Links between ranks, with stated figures for some kinds of machine."""

import dataclasses

from jaxinfer.sharding.checks import at_least, positive


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """What a step of a schedule costs on a machine; figures are per direction.

    Rank r is in node r // ranks_per_node. Within a node every pair of ranks is connected.

    Attributes:
        name: For tables.
        num_ranks: n.
        link_bytes_per_s: What one ordered pair of ranks in a node reaches.
        port_bytes_per_s: What one rank reaches in sum over its peers in the node.
        latency_s: Start of one grouped exchange within a node, launch included.
        message_s: Added by each message that a rank sends in the exchange.
        ranks_per_node: g; None: all ranks are in one node.
        nic_bytes_per_s: What one rank reaches to other nodes; needed with more than one node.
        nic_latency_s: As `latency_s`, for an exchange that leaves the node.
        hidden: Share of the shorter of exchange and attention, side by side, that the longer one
            hides; 1 where nobody measured it.
        basis: Where the figures come from.

    Raises:
        ValueError: If a figure is not finite and positive, `hidden` is no share, `ranks_per_node`
            does not divide `num_ranks`, or there are several nodes and no `nic_bytes_per_s`.
    """

    name: str
    num_ranks: int
    link_bytes_per_s: float
    port_bytes_per_s: float
    latency_s: float
    message_s: float
    ranks_per_node: int | None = None
    nic_bytes_per_s: float | None = None
    nic_latency_s: float = 25e-6
    hidden: float = 1.0
    basis: str = "given by the caller"

    def __post_init__(self) -> None:
        at_least("num_ranks", self.num_ranks, 1)
        positive("link_bytes_per_s", self.link_bytes_per_s)
        positive("port_bytes_per_s", self.port_bytes_per_s)
        positive("latency_s", self.latency_s, zero=True)
        positive("message_s", self.message_s, zero=True)
        positive("nic_latency_s", self.nic_latency_s, zero=True)
        if not 0 <= self.hidden <= 1:
            raise ValueError(f"hidden must be from 0 to 1; got {self.hidden}")
        if self.ranks_per_node is not None:
            at_least("ranks_per_node", self.ranks_per_node, 1)
            if self.num_ranks % self.ranks_per_node:
                raise ValueError(
                    f"ranks_per_node must divide num_ranks={self.num_ranks}; "
                    f"got {self.ranks_per_node}"
                )
        if self.nic_bytes_per_s is not None:
            positive("nic_bytes_per_s", self.nic_bytes_per_s)
        elif self.num_nodes > 1:
            raise ValueError(f"{self.num_nodes} nodes need nic_bytes_per_s; got None")

    @property
    def num_nodes(self) -> int:
        """Nodes, u."""
        return self.num_ranks // (self.ranks_per_node or self.num_ranks)


def h100_nvswitch(num_ranks: int = 8) -> Topology:
    """H100 SXM GPUs behind NVSwitch: one peer can take almost the whole port.

    NVLink 4 carries 450 GB/s per GPU and direction (data sheet). Assumed to be reached: 80 % of
    it by one pair, 89 % in sum.
    """
    return Topology(
        name="h100-nvswitch",
        num_ranks=num_ranks,
        link_bytes_per_s=360e9,
        port_bytes_per_s=400e9,
        latency_s=10e-6,
        message_s=0.5e-6,
        basis="450 GB/s per GPU and direction by data sheet; 80 % by a pair, 89 % in sum assumed",
    )


def h200_nvswitch(num_ranks: int = 8) -> Topology:
    """H200 GPUs behind NVSwitch, as far as two of them were measured.

    By `bench/results/nvidia_h200/ring_attention.json`, permutes of 17, 67 and 268 MB take 5 µs more
    for each further MB, and 22 to 52 % of one are hidden where that is more than noise. Two GPUs
    do not tell what one reaches in sum over several peers: that is assumed as for `h100_nvswitch`.
    """
    return dataclasses.replace(
        h100_nvswitch(num_ranks),
        name="h200-nvswitch",
        link_bytes_per_s=200e9,
        hidden=0.4,
        basis="200 GB/s by a pair and 40 % of an exchange hidden, measured on two H200; "
        "400 GB/s in sum and 10 µs assumed",
    )


def mi300x_mesh(num_ranks: int = 8) -> Topology:
    """MI300X-like full mesh: each pair has its own link, and one pair cannot use the others.

    64 GB/s per link and direction (data sheet), seven links per GPU; 75 % assumed to be reached.
    """
    return Topology(
        name="mi300x-mesh",
        num_ranks=num_ranks,
        link_bytes_per_s=48e9,
        port_bytes_per_s=48e9 * max(num_ranks - 1, 1),
        latency_s=15e-6,
        message_s=0.5e-6,
        basis="64 GB/s per link and direction by data sheet; 75 % assumed",
    )


def mi300x_tasp(num_ranks: int = 8) -> Topology:
    """As `mi300x_mesh`, with the gain of all links over one that TASP measured.

    Eight MI300X moved keys and values 2.4 times faster over seven rings than over one
    (arXiv 2509.26541, communication alone, 10 K tokens, batch 48), not seven times.
    """
    mesh = mi300x_mesh(num_ranks)
    return dataclasses.replace(
        mesh,
        name="mi300x-tasp",
        port_bytes_per_s=min(2.4 * mesh.link_bytes_per_s, mesh.port_bytes_per_s),
        basis="as mi300x-mesh; all links together reach 2.4 times one link (TASP, measured)",
    )


def pcie5(num_ranks: int = 8) -> Topology:
    """GPUs on PCIe 5.0 x16: one pair fills the port, so more rings gain nothing.

    63 GB/s per direction (specification); 80 % assumed to be reached.
    """
    return Topology(
        name="pcie5",
        num_ranks=num_ranks,
        link_bytes_per_s=50e9,
        port_bytes_per_s=50e9,
        latency_s=15e-6,
        message_s=1e-6,
        basis="63 GB/s per direction by specification; 80 % assumed",
    )


def h100_nodes(num_ranks: int = 16, ranks_per_node: int = 8) -> Topology:
    """Nodes of H100 GPUs behind NVSwitch, one 400 Gb/s network card per GPU (90 % assumed)."""
    return dataclasses.replace(
        h100_nvswitch(num_ranks),
        name="h100-nodes",
        ranks_per_node=ranks_per_node,
        nic_bytes_per_s=45e9,
        nic_latency_s=25e-6,
        basis="as h100-nvswitch within a node; 400 Gb/s per GPU between nodes, 90 % assumed",
    )


TOPOLOGIES = {
    "h100-nvswitch": h100_nvswitch,
    "h200-nvswitch": h200_nvswitch,
    "mi300x-mesh": mi300x_mesh,
    "mi300x-tasp": mi300x_tasp,
    "pcie5": pcie5,
    "h100-nodes": h100_nodes,
}
