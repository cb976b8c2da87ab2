"""Choose how pieces travel: a schedule and a transport, by the modelled time of both."""

import dataclasses
import difflib
import functools
from typing import Literal

from jaxinfer.sharding.all_gather import all_gather
from jaxinfer.sharding.choose import TIE, candidates
from jaxinfer.sharding.cost import Prediction, Workload, overlapped, predict
from jaxinfer.sharding.kinds import build
from jaxinfer.sharding.schedule import Schedule
from jaxinfer.sharding.topology import Topology

Transport = Literal["ppermute", "all_to_all", "all_gather", "collective_group"]
TRANSPORTS = ("ppermute", "all_to_all", "all_gather", "collective_group")
# Those that carry any schedule and are chosen; `collective_group` is taken by name only.
_CHOSEN: tuple[Transport, ...] = ("ppermute", "all_to_all")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A schedule, what carries it, and what both were compared with.

    Attributes:
        schedule: Who sends which piece to whom. With transport `all_gather` its pieces are groups
            of KV heads, otherwise they are runs of tokens.
        transport: `"ppermute"`, `"all_to_all"`, `"all_gather"` or `"collective_group"`.
        predictions: Modelled times by (kind of schedule, transport), the simplest first.
    """

    schedule: Schedule
    transport: Transport
    predictions: dict[tuple[str, Transport], Prediction]


@functools.lru_cache(maxsize=256)
def plan(
    topology: Topology,
    workload: Workload,
    *,
    schedule: Schedule | str | None = None,
    transport: Transport | None = None,
    chunks: int | None = None,
    masks_differ: bool = False,
) -> Plan:
    """Pick the schedule and transport with the least modelled time.

    The plain ring by `ppermute` comes first and wins ties (within 0.1 %), so the choice is never
    predicted to be slower, unless an argument excludes it.

    Args:
        topology: Links between n ranks.
        workload: Attention to be computed.
        schedule: Take this one, or this kind, and choose the transport only.
        transport: Take this one and choose the schedule only. `collective_group`, which needs JAX
            0.12, is never chosen, only taken.
        chunks: Choose only schedules that can cut each of so many chunks of a rank's tokens into
            equal pieces; None: tokens can be padded to fit any. One asked for is taken as it is.
        masks_differ: As in `predict_transport`. Several pieces per rank are then not chosen: only
            whole stripes have masks without an offset, which the fast implementations need.

    Returns:
        The plan with the predictions behind it.

    Raises:
        ValueError: If a name is unknown, the schedule is for another number of ranks or is not
            exact (`Schedule.validate`), or `all_gather` is to carry another schedule than an
            `all_gather` whose number of pieces divides K.

    Example:
        >>> from jaxinfer.sharding.topology import h100_nvswitch, mi300x_tasp
        >>> work = Workload(tokens_per_rank=4096, num_heads=20, num_kv_heads=20, head_dim=128)
        >>> for topology in (h100_nvswitch(8), mi300x_tasp(8)):
        ...     chosen = plan(topology, work)
        ...     print(chosen.schedule.name, chosen.transport)
        ring ppermute
        all_gather all_to_all
    """
    _check_transport(transport)
    options = _options(topology, workload, schedule, transport, chunks, masks_differ)
    predictions: dict[tuple[str, Transport], Prediction] = {
        (option.name, carrier): predict_transport(
            option, carrier, topology, workload, masks_differ=masks_differ
        )
        for option, carrier in options
    }
    limit = min(p.total_s for p in predictions.values()) * (1 + TIE)
    best = next(i for i, (s, c) in enumerate(options) if predictions[s.name, c].total_s <= limit)
    return Plan(schedule=options[best][0], transport=options[best][1], predictions=predictions)


def _check_transport(transport: object) -> None:
    if transport is not None and transport not in TRANSPORTS:
        near = difflib.get_close_matches(str(transport), TRANSPORTS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown transport {transport!r}; {hint}known: {', '.join(TRANSPORTS)}")


def _options(
    topology: Topology,
    workload: Workload,
    schedule: Schedule | str | None,
    transport: Transport | None,
    chunks: int | None,
    masks_differ: bool,
) -> list[tuple[Schedule, Transport]]:
    """What may be chosen, the simplest to run first."""
    n = topology.num_ranks
    if isinstance(schedule, str):
        if schedule == "all_gather" and transport == "all_gather":
            schedule = _by_heads(topology, workload, masks_differ)
        else:
            per_node = topology.ranks_per_node if schedule == "multinode" else None
            schedule = build(schedule, n, ranks_per_node=per_node)
    if schedule is not None:
        if schedule.num_ranks != n:
            raise ValueError(f"schedule {schedule.name!r} has {schedule.num_ranks} ranks; got {n}")
        schedule.validate()
        if transport is not None:
            if transport == "all_gather":
                check_heads(schedule, workload.num_kv_heads)
            return [(schedule, transport)]
        return [(schedule, carrier) for carrier in _CHOSEN]
    carriers = _CHOSEN if transport is None else (transport,)
    found: list[tuple[Schedule, Transport]] = []
    for option in candidates(topology).values():
        if masks_differ and option.pieces_per_rank > 1:
            continue
        # The ring stays in any case: what no schedule fits is for the caller to pad.
        multiple = (chunks or 1) * option.pieces_per_rank
        any_length = chunks is None or option.pieces_per_rank == 1
        if any_length or workload.tokens_per_rank % multiple == 0:
            found.extend((option, carrier) for carrier in carriers if carrier != "all_gather")
    if (transport in (None, "all_gather") and n > 1) or transport == "all_gather":
        found.append((_by_heads(topology, workload, masks_differ), "all_gather"))
    return found


def _by_heads(topology: Topology, workload: Workload, masks_differ: bool) -> Schedule:
    """All-gather of one group of KV heads after the other, in the best number up to n - 1."""
    n, heads = topology.num_ranks, workload.num_kv_heads
    options = [all_gather(n, m) for m in range(1, max(n, 2)) if heads % m == 0]

    def modelled(option: Schedule) -> float:
        return predict_transport(
            option, "all_gather", topology, workload, masks_differ=masks_differ
        ).total_s

    return min(options, key=modelled)


def check_heads(schedule: Schedule, num_kv_heads: int) -> None:
    """Refuse a schedule that an all-gather of KV heads cannot follow.

    Raises:
        ValueError: If it is of another kind, or its number of pieces does not divide K.
    """
    if schedule.name != "all_gather":
        raise ValueError(
            f"transport 'all_gather' carries schedule 'all_gather' only; got {schedule.name!r}"
        )
    if num_kv_heads % schedule.pieces_per_rank:
        raise ValueError(
            f"transport 'all_gather' cuts KV heads: pieces must divide {num_kv_heads}; "
            f"got {schedule.pieces_per_rank}"
        )


def predict_transport(
    schedule: Schedule,
    transport: Transport,
    topology: Topology,
    workload: Workload,
    *,
    masks_differ: bool = False,
) -> Prediction:
    """Model one attention layer over a schedule with the traffic of a transport.

    * `ppermute`: lanes of a step go one after another, each with a latency of its own.
    * `all_to_all`: lanes go together, and idle links carry a piece that nobody reads.
    * `collective_group`: lanes go together and nothing else does, but not beside attention: the
      group runs on the stream that computes.
    * `all_gather`: attention needs the first group of heads before it can begin, so the first
      exchange is not hidden. A group is one attention call, with a causal mask (zigzag) four, and
      with masks that differ n.

    Args:
        schedule: n ranks.
        transport: `"ppermute"`, `"all_to_all"`, `"all_gather"` or `"collective_group"`.
        topology: Links between n ranks.
        workload: Attention.
        masks_differ: Pieces of different ranks have different masks, and so each an attention call
            of its own (striped placement under a causal mask).

    Returns:
        Modelled seconds, never measured ones.

    Raises:
        ValueError: If the topology has another number of ranks.
    """
    steps, n, lanes = schedule.destination.shape
    m = schedule.pieces_per_rank
    prediction = predict(schedule.destination, m, topology, workload)
    own, *others = prediction.computation_s
    another_s = workload.step_overhead_s + workload.part_s
    more_calls_s = (lanes - 1) * another_s if masks_differ else 0.0
    computation = (own, *(seconds + more_calls_s for seconds in others))
    if transport == "ppermute":
        alone = schedule.destination.transpose(0, 2, 1).reshape(steps * lanes, n, 1)
        times = predict(alone, m, topology, workload).communication_s
        communication = tuple(sum(times[t * lanes : (t + 1) * lanes]) for t in range(steps))
        return overlapped(communication, computation, hidden=topology.hidden)
    if transport == "collective_group":
        return Prediction(
            communication_s=prediction.communication_s,
            computation_s=computation,
            total_s=sum(prediction.communication_s) + sum(computation),
        )
    every_link = all_gather(n, steps).destination if steps else schedule.destination
    together = predict(every_link, m, topology, workload)
    if transport == "all_to_all" or not steps:
        return overlapped(together.communication_s, computation, hidden=topology.hidden)
    calls = n if masks_differ else 4 if workload.causal else 1
    # In zigzag both chunks have two parts; of a causal mask over one chunk nothing is known here.
    parts = n - 1 if masks_differ else 1 if workload.causal else 0
    group_s = workload.block_s * n / m + workload.step_overhead_s * calls
    group_s += workload.part_s * parts / m
    waiting = together.communication_s[0]
    beside = overlapped(together.communication_s[1:], (group_s,) * m, hidden=topology.hidden)
    return Prediction(
        communication_s=together.communication_s,
        computation_s=beside.computation_s,
        total_s=waiting + beside.total_s,
    )
