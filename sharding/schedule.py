"""One type for every communication schedule: who sends which piece to whom, and when."""

import dataclasses

import numpy as np
import numpy.typing as npt

from jaxinfer.sharding.cost import Prediction, Workload, predict
from jaxinfer.sharding.topology import Topology

IntArray = npt.NDArray[np.int32]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Schedule:
    """Moves of the pieces of a sequence-sharded array until every rank has seen every piece.

    Each of n ranks owns m pieces of its block. In one step a rank sends one piece in each of its
    lanes and receives one piece in each; a lane of a step is a permutation of the ranks, so that
    it can run as one collective permute, and all lanes of a step together as one grouped
    exchange. A rank can send what it owns at any step, and what it received in the step before:
    a current and a next buffer are all the memory a schedule needs.

    The arrays may hold any integers; they are copied to read-only int32.

    Attributes:
        name: Kind of schedule, for messages and tables.
        num_ranks: n.
        pieces_per_rank: m, pieces each rank owns.
        owner: [n·m] rank that owns each piece.
        destination: [steps, n, lanes] rank to which rank r sends in lane a at step t.
        piece: [steps, n, lanes] piece that it sends there.

    Raises:
        ValueError: If an array has the wrong shape or holds numbers that are not integers. The
            moves themselves are checked by `validate`.
    """

    name: str
    num_ranks: int
    pieces_per_rank: int
    owner: np.ndarray
    destination: np.ndarray
    piece: np.ndarray

    def __post_init__(self) -> None:
        for field in ("num_ranks", "pieces_per_rank"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1; got {getattr(self, field)}")
        for field in ("owner", "destination", "piece"):
            given = np.asarray(getattr(self, field))
            if not np.issubdtype(given.dtype, np.integer):
                raise ValueError(f"{field} must hold integers; got dtype {given.dtype}")
            array = np.array(given, dtype=np.int32)
            array.setflags(write=False)
            object.__setattr__(self, field, array)
        if self.owner.shape != (self.num_pieces,):
            raise ValueError(
                f"owner must have one entry for each of {self.num_ranks} x "
                f"{self.pieces_per_rank} pieces; got shape {self.owner.shape}"
            )
        shape = self.destination.shape
        if len(shape) != 3 or shape[1] != self.num_ranks or self.piece.shape != shape:
            raise ValueError(
                f"destination and piece must both be [steps, {self.num_ranks}, lanes]; "
                f"got {shape} and {self.piece.shape}"
            )

    @property
    def num_pieces(self) -> int:
        """Pieces in the system, n·m."""
        return self.num_ranks * self.pieces_per_rank

    @property
    def num_steps(self) -> int:
        """Exchanges; attention runs once more, on the own block before the first."""
        return self.destination.shape[0]

    @property
    def num_lanes(self) -> int:
        """Pieces that each rank sends, and receives, in a step."""
        return self.destination.shape[2]

    @property
    def link_share(self) -> float:
        """Share of the n(n - 1) directed links that each step uses."""
        return self.num_lanes / max(self.num_ranks - 1, 1)

    @property
    def has_fixed_links(self) -> bool:
        """Whether every lane sends to the same rank at every step."""
        return bool((self.destination == self.destination[:1]).all())

    @property
    def keeps_lanes(self) -> bool:
        """Whether a piece that is passed on stays in the lane in which it arrived."""
        return bool((self.arrivals()[:-1] == self.piece[1:]).all())

    @property
    def is_direct(self) -> bool:
        """Whether ranks send only what they own and pass nothing on."""
        return bool((self.owner[self.piece] == np.arange(self.num_ranks)[:, None]).all())

    def own_pieces(self) -> IntArray:
        """[n, m] pieces that each rank owns, ascending."""
        order = np.argsort(self.owner, kind="stable").astype(np.int32)
        return order.reshape(self.num_ranks, self.pieces_per_rank)

    def arrivals(self) -> IntArray:
        """[steps, n, lanes] piece that rank r holds in lane a after step t."""
        arrived = np.empty_like(self.piece)
        np.put_along_axis(arrived, self.destination.astype(np.int64), self.piece, axis=1)
        return arrived

    def routes(self) -> IntArray:
        """[n·m, steps + 1] rank at which a piece arrives after each step; -1: it does not move.

        Column 0 is the owner. A piece that its owner sends to several ranks in one step (a
        broadcast) has no single route.

        Raises:
            ValueError: If a piece arrives at more than one rank in a step.
        """
        routes = np.full((self.num_pieces, self.num_steps + 1), -1, np.int32)
        routes[:, 0] = self.owner
        for step in range(self.num_steps):
            pieces = self.piece[step].ravel()
            if len(np.unique(pieces)) < len(pieces):
                raise ValueError(f"{self.name} broadcasts pieces: they have no single route")
            routes[pieces, step + 1] = self.destination[step].ravel()
        return routes

    def validate(self) -> None:
        """Check that the schedule is exact.

        Raises:
            ValueError: Naming the step, rank, lane or piece, unless all of this holds: each rank
                owns m pieces; a lane of a step is a permutation of the ranks that moves each of
                them; no directed link carries two pieces in one step; a rank sends only what it
                owns or received in the step before; every piece visits every rank exactly once,
                its owner counted as visited.
        """
        n = self.num_ranks
        ranks = np.arange(n)
        _check_range("owner", self.owner, n)
        _check_range("destination", self.destination, n)
        _check_range("piece", self.piece, self.num_pieces)
        owned = np.bincount(self.owner, minlength=n)
        if (owned != self.pieces_per_rank).any():
            rank = int(np.argmax(owned != self.pieces_per_rank))
            raise ValueError(
                f"rank {rank} owns {owned[rank]} pieces; every rank must own {self.pieces_per_rank}"
            )
        visits = np.zeros((self.num_pieces, n), np.int32)
        visits[np.arange(self.num_pieces), self.owner] = 1
        home = visits.astype(bool)
        held = home
        for step in range(self.num_steps):
            to, what = self.destination[step], self.piece[step]
            _check_lanes(step, to, ranks)
            _check_links(step, to, ranks)
            missing = ~held[what, ranks[:, None]]
            if missing.any():
                rank, lane = np.argwhere(missing)[0]
                raise ValueError(
                    f"step {step}: rank {rank} sends piece {what[rank, lane]}, which it neither "
                    f"owns nor received in the step before"
                )
            np.add.at(visits, (what.ravel(), to.ravel()), 1)
            held = home.copy()
            held[what.ravel(), to.ravel()] = True
        if (visits != 1).any():
            piece, rank = np.argwhere(visits != 1)[0]
            raise ValueError(
                f"piece {piece} visits rank {rank} {visits[piece, rank]} times; "
                f"every piece must visit every rank once"
            )

    def predict(self, topology: Topology, workload: Workload) -> Prediction:
        """Model the time of attention over this schedule; see `cost.predict`.

        Args:
            topology: Links between `num_ranks` ranks.
            workload: Attention to be computed.

        Returns:
            Modelled seconds, never measured ones.

        Raises:
            ValueError: If the topology has another number of ranks.
        """
        return predict(self.destination, self.pieces_per_rank, topology, workload)


def _check_range(name: str, array: IntArray, limit: int) -> None:
    outside = (array < 0) | (array >= limit)
    if outside.any():
        where = tuple(int(i) for i in np.argwhere(outside)[0])
        raise ValueError(f"{name} must be in 0..{limit - 1}; got {array[where]} at {where}")


def _check_lanes(step: int, destination: IntArray, ranks: npt.NDArray[np.int_]) -> None:
    """Each lane permutes the ranks and leaves none in place."""
    uneven = (np.sort(destination, axis=0) != ranks[:, None]).any(axis=0)
    if uneven.any():
        lane = int(np.argmax(uneven))
        raise ValueError(f"step {step}, lane {lane}: some rank receives more than one piece")
    fixed = destination == ranks[:, None]
    if fixed.any():
        rank, lane = np.argwhere(fixed)[0]
        raise ValueError(f"step {step}, lane {lane}: rank {rank} sends to itself")


def _check_links(step: int, destination: IntArray, ranks: npt.NDArray[np.int_]) -> None:
    """No directed link carries two pieces."""
    ordered = np.sort(destination, axis=1)
    repeated = ordered[:, 1:] == ordered[:, :-1]
    if repeated.any():
        rank, slot = np.argwhere(repeated)[0]
        raise ValueError(
            f"step {step}: link {ranks[rank]}->{ordered[rank, slot]} carries more than one piece"
        )
