"""Attention over a sequence that is sharded over the devices, by schedule and transport.

One row is a call of the whole group, by the clock of the host. `xla-all_gather` is the baseline:
XLA's all-gather of all keys and values, then attention, and nothing beside it. `dispatch` is what
the cost model takes. Each attends by the kernels that serve its calls, which need not be the same:
`ring-cudnn` is the ring with cuDNN, to be compared where the baseline has that. Rows also have the
time of the exchanges alone, of the attention alone, their overlap, and the gain over the plain ring
and over the baseline. The overlap is (communication + computation - call) / the shorter of the two:
1 where the longer one hides all of it, 0 where they might as well run one after the other. It is
below zero where the call takes longer than both together (noise, or contention for memory and
cores), and above 1 where it takes less than the longer one alone, which is noise.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bench.case import Implementation, Measurement
from bench.gate import check_on_devices
from bench.timing import Compiled, compile_all
from jaxinfer.pallas_kernels.attention.api import attention
from jaxinfer.pallas_kernels.device import current_device
from jaxinfer.pallas_kernels.dispatch import NotSupported, choices
from jaxinfer.sharding.kinds import build
from jaxinfer.sharding.schedule import Schedule
from jaxinfer.sharding.sequence_parallel import heads_gather
from jaxinfer.sharding.sequence_parallel.exchange import EXCHANGES
from jaxinfer.sharding.sequence_parallel.placement import Placement, place
from jaxinfer.sharding.sequence_parallel.ring import plan_for, ring_attention

_AXIS = "ranks"
_CALLS = 4  # in flight together, if they are short: the host's part of a call is not the device's
_SHORT_S = 0.02
_TIMED_S = 0.5  # of one function, unless five calls take longer
_TOTALS = (8192, 32768, 131072)  # tokens of all devices
_LONGEST = _TOTALS[-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Way:
    """How pieces travel, and by what they are attended to.

    Attributes:
        kind: Of schedule.
        transport: As in `ring_attention`.
        pieces: Of an all-gather; 0: two groups of heads, if there are two.
        local: Implementation of the local attention; None: the dispatcher's.
    """

    kind: str
    transport: Any
    pieces: int = 0
    local: str | None = None

    def schedule(self, n: int, num_kv_heads: int) -> Schedule:
        """The schedule for n devices.

        Raises:
            ValueError: there is none.
        """
        if self.kind != "all_gather":
            return build(self.kind, n)
        return build(self.kind, n, pieces=self.pieces or (2 if num_kv_heads % 2 == 0 else 1))

    @property
    def name(self) -> str:
        """Of one that is not in the table."""
        return f"{self.kind}-{self.transport}" + f"-{self.pieces}" * (self.pieces > 0)


# Those that a number of devices does not have are reported as such.
_WAYS = {
    "ring": _Way(kind="ring", transport="ppermute"),
    "xla-all_gather": _Way(kind="all_gather", transport="all_gather", pieces=1),
    "ring-cudnn": _Way(kind="ring", transport="ppermute", local="cudnn"),
    "ring-all_to_all": _Way(kind="ring", transport="all_to_all"),
    "hamilton-all_to_all": _Way(kind="hamilton", transport="all_to_all"),
    "full_link-all_to_all": _Way(kind="full_link", transport="all_to_all"),
    "xor-all_to_all": _Way(kind="xor", transport="all_to_all"),
    "full_link-collective_group": _Way(kind="full_link", transport="collective_group"),
    "heads-all_gather": _Way(kind="all_gather", transport="all_gather"),
}
_GAINS = {"gain_over_ring": "ring", "gain_over_xla": "xla-all_gather"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RingCase:
    """A prompt of n·T tokens on n devices.

    Attributes:
        model: Whose heads.
        n: Devices.
        T: Tokens of each.
        N: Query heads.
        K: KV heads.
        H: Head dimension.
        is_causal: As in the op; tokens are then placed in zigzag.
        tag: As in `Case`.
    """

    model: str
    n: int
    T: int
    N: int
    K: int
    H: int
    is_causal: bool = True
    tag: str = "primary"

    @property
    def name(self) -> str:
        """As in `Case`."""
        return f"{self.model} n{self.n} t{self.T} {'causal' if self.is_causal else 'full'}"

    @property
    def flops(self) -> float:
        """Of one device."""
        pairs = self.n * self.T**2 / (2 if self.is_causal else 1)
        return 4 * pairs * self.N * self.H

    @property
    def bytes(self) -> float:
        """Of one device's own memory: its queries and output, and everybody's keys and values."""
        size = jnp.dtype(self.dtype).itemsize
        return 2 * size * self.T * self.H * (self.N + self.n * self.K)

    @property
    def implementations(self) -> tuple[str, ...]:
        """The cost model's choice, and every way."""
        return ("dispatch", *_WAYS)

    @property
    def dtype(self) -> str:
        """Of queries, keys and values."""
        return "float32" if current_device().platform == "cpu" else "bfloat16"

    @property
    def placement(self) -> Placement:
        """Under which all devices have the same work."""
        return "zigzag" if self.is_causal else "contiguous"

    @property
    def mesh(self) -> Mesh:
        """The first n devices."""
        return Mesh(np.asarray(jax.devices()[: self.n]), (_AXIS,))

    def measure(self, implementation: str, *, repeats: int) -> Measurement:
        """Check against attention that is not sharded by tokens, then time; see `Case.measure`.

        Args:
            implementation: One of `implementations`.
            repeats: At most so many; fewer where calls are long.
        """
        if jax.device_count() < self.n or self.n < 2:
            raise NotSupported(
                "ring_attention", implementation, f"{jax.device_count()} devices",
                f"{max(self.n, 2)} or more",
            )  # fmt: skip
        name = self.planned if implementation == "dispatch" else implementation
        timed = _timed(self, name, repeats)
        median = timed.median("call")
        extra = {"devices": self.n, "tokens_per_s": self.n * self.T * 1e6 / median}
        if len(timed.times) > 1:
            alone = timed.median("communication"), timed.median("computation")
            extra |= {"communication_us": alone[0], "computation_us": alone[1],
                      "overlap": (sum(alone) - median) / min(alone)}  # fmt: skip
        for key, other in _GAINS.items():
            with contextlib.suppress(Exception):  # it is reported with its own row
                extra[key] = _timed(self, other, repeats).median("call") / median
        return Measurement.of(
            timed.times["call"], rel_rms=timed.error, compile_s=timed.compile_s, extra=extra,
            implementation=name if implementation == "dispatch" else timed.local,
            details=_details(extra),
        )  # fmt: skip

    def way(self, name: str) -> _Way:
        """One of the table, or the cost model's."""
        return _WAYS.get(name, self._plan)

    @property
    def planned(self) -> str:
        """Name of the way that the cost model takes."""
        plan = self._plan
        wanted = plan.schedule(self.n, self.K)
        for name, way in _WAYS.items():
            if (way.kind, way.transport, way.local) != (plan.kind, plan.transport, None):
                continue
            if way.schedule(self.n, self.K).pieces_per_rank == wanted.pieces_per_rank:
                return name
        return plan.name

    @property
    def _plan(self) -> _Way:
        chosen = plan_for(
            self.n, (1, self.T, self.N, self.H), self.K, jnp.dtype(self.dtype).itemsize,
            schedule=None, transport=None, topology=None, placement=self.placement,
            is_causal=self.is_causal,
        )  # fmt: skip
        kind = chosen.schedule.name
        pieces = chosen.schedule.pieces_per_rank if kind == "all_gather" else 0
        return _Way(kind=kind, transport=chosen.transport, pieces=pieces)


def _same_before(name: str, way: _Way, n: int, num_kv_heads: int) -> str:
    """A way before this one that sends the same pieces by the same transport; empty: none."""
    schedule = way.schedule(n, num_kv_heads)
    for earlier, other in _WAYS.items():
        if earlier == name:
            break
        if (other.transport, other.local) != (way.transport, way.local):
            continue
        try:
            known = other.schedule(n, num_kv_heads)
        except ValueError:
            continue
        arrays = ("owner", "destination", "piece")
        if all(np.array_equal(getattr(known, a), getattr(schedule, a)) for a in arrays):
            return earlier
    return ""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Timed:
    """A way that gave the right result.

    Attributes:
        error: Of the result.
        compile_s: Of the call.
        local: The last local attention that was traced.
        times: µs of the call, and but for one with a named local attention, of the exchanges and
            the attention alone.
    """

    error: float
    compile_s: float
    local: str
    times: dict[str, list[float]]

    def median(self, key: str) -> float:
        """Of one of them, µs."""
        return float(np.median(self.times[key]))


_results: dict[tuple[RingCase, str, int], _Timed | Exception] = {}


def _timed(case: RingCase, name: str, repeats: int) -> _Timed:
    """Measure a way, once: others are compared with it, and the cost model may take it."""
    key = case, name, repeats
    if key not in _results:
        try:
            _results[key] = _measure(case, name, repeats)
        except Exception as error:
            _results[key] = error
    result = _results[key]
    if isinstance(result, Exception):
        raise result
    return result


def _measure(case: RingCase, name: str, repeats: int) -> _Timed:
    programs, (arrays, want) = _programs(case, name), _data(case)
    call = programs["call"]
    error = check_on_devices(call.call(*arrays), want, case.dtype)
    times = {key: _times(one.call, arrays, repeats) for key, one in programs.items()}
    return _Timed(error=error, compile_s=call.seconds, local=call.note, times=times)


def _programs(case: RingCase, name: str) -> dict[str, Compiled]:
    """What is timed of a way: the call, its exchanges alone, its attention alone."""
    way = case.way(name)
    refuse = functools.partial(NotSupported, "ring_attention", name)
    try:
        schedule = way.schedule(case.n, case.K)
    except ValueError as error:
        raise refuse(f"{case.n} devices ({error})", "others") from None
    same = _same_before(name, way, case.n, case.K)
    if same:
        raise refuse(f"{case.n} devices, where it is {same}", "more devices")
    ours = functools.partial(
        ring_attention, axis_name=_AXIS, placement=case.placement, is_causal=case.is_causal,
        schedule=schedule, transport=way.transport, implementation=way.local,
    )  # fmt: skip

    def computation(*arrays: jax.Array) -> jax.Array:
        """The attention of the same steps, on pieces that need not be fetched."""
        if way.transport == "all_gather":
            absent: Any = mock.patch.object(heads_gather, "gather", _no_gather)
        else:
            absent = mock.patch.dict(EXCHANGES, {way.transport: _no_exchange})
        with absent:
            return ours(*arrays)

    functions: dict[str, Callable[..., Any]] = {"call": ours}
    if way.local is None:
        alone = _gathers if way.transport == "all_gather" else _exchanges
        functions["communication"] = functools.partial(alone, schedule, way.transport)
        functions["computation"] = computation
    arrays, _ = _data(case)
    compiled = compile_all(
        {key: Implementation(call=_sharded(case, one)) for key, one in functions.items()},
        lambda _: tuple(arrays),
        lambda: choices()["attention"].implementation if "attention" in choices() else "",
    )
    programs = {}
    for key, one in compiled.items():
        if isinstance(one, Exception):
            raise one
        programs[key] = one
    return programs


@functools.lru_cache(maxsize=1)
def _data(case: RingCase) -> tuple[list[jax.Array], jax.Array]:
    """Queries, keys and values as placed on the devices, and what must come out, in float32."""
    heads, S = (case.N, case.K, case.K), case.n * case.T
    arrays = [
        jax.random.normal(key, (1, S, h, case.H), case.dtype)
        for key, h in zip(jax.random.split(jax.random.key(0), 3), heads, strict=True)
    ]
    by_tokens = NamedSharding(case.mesh, P(None, _AXIS))

    def reference(*arrays: jax.Array) -> jax.Array:
        wide = (x.astype(jnp.float32) for x in arrays)
        return attention(*wide, implementation="xla", is_causal=case.is_causal)

    # Heads are attended to one by one, so devices may share them; tokens are another matter.
    spec = P(None, None, _AXIS if case.K % case.n == 0 else None)
    whole = jax.shard_map(reference, mesh=case.mesh, in_specs=spec, out_specs=spec, check_vma=False)
    with jax.default_matmul_precision("highest"):
        want = jax.jit(whole)(*(jax.device_put(x, NamedSharding(case.mesh, spec)) for x in arrays))
    placed = [jax.device_put(place(x, case.placement, case.n), by_tokens) for x in (*arrays, want)]
    jax.block_until_ready(placed)
    return placed[:3], placed[3]


def _sharded(case: RingCase, function: Callable[..., Any]) -> Callable[..., Any]:
    spec = P(None, _AXIS)
    return jax.shard_map(function, mesh=case.mesh, in_specs=spec, out_specs=spec, check_vma=False)


def _exchanges(
    schedule: Schedule, transport: str, query: jax.Array, key: jax.Array, value: jax.Array
) -> jax.Array:
    """All steps of a schedule without attention; something of the last pieces."""
    B, T, K, H = key.shape
    m = schedule.pieces_per_rank
    own = jnp.stack([key, value]).reshape(2, B, m, T // m, K, H).swapaxes(0, 2).swapaxes(1, 2)
    pieces = None
    total = jnp.zeros((), jnp.float32)
    for step in range(schedule.num_steps):
        # Whole pieces are wanted, whatever is read of them.
        pieces = lax.optimization_barrier(EXCHANGES[transport](schedule, step, own, pieces, _AXIS))
        total = total + pieces.ravel()[0].astype(jnp.float32)
    return jnp.broadcast_to(total, query.shape[:2])


def _gathers(
    schedule: Schedule, _: str, query: jax.Array, key: jax.Array, value: jax.Array
) -> jax.Array:
    """All groups of heads without attention; something of each."""
    total = jnp.zeros((), jnp.float32)
    for group in jnp.split(jnp.stack([key, value]), schedule.pieces_per_rank, axis=3):
        gathered = lax.optimization_barrier(heads_gather.gather(group, _AXIS))
        total = total + gathered.ravel()[0].astype(jnp.float32)
    return jnp.broadcast_to(total, query.shape[:2])


def _no_gather(group: jax.Array, axis_name: Any) -> jax.Array:
    """The shape of what a gather brings, out of what is here."""
    n = lax.axis_size(axis_name)
    return jnp.stack([jnp.roll(group, rank, axis=-2) for rank in range(n)])


def _no_exchange(
    schedule: Schedule, step: int, own: jax.Array, current: jax.Array | None, axis_name: Any
) -> jax.Array:
    """The shape of what a step brings, out of what is here."""
    del current, axis_name
    # Of every step another rotation, so that no step is taken for a repetition of the one before.
    lanes = (own[lane % len(own)] for lane in range(schedule.num_lanes))
    return jnp.stack([jnp.roll(piece, step + 1, axis=-2) for piece in lanes])


def _times(call: Callable[..., Any], arrays: list[jax.Array], repeats: int) -> list[float]:
    """µs of a call, of several that are in flight together if they are short."""
    once = 0.0
    for _ in range(2):  # the first one also connects the devices
        start = time.perf_counter()
        jax.block_until_ready(call(*arrays))
        once = time.perf_counter() - start
    calls = _CALLS if once < _SHORT_S else 1
    times = []
    for _ in range(min(repeats, max(5, int(_TIMED_S / (once * calls))))):
        start = time.perf_counter()
        jax.block_until_ready([call(*arrays) for _ in range(calls)])
        times.append((time.perf_counter() - start) * 1e6 / calls)
    return times


def _details(extra: dict[str, float]) -> str:
    """What a row's own line has no column for."""
    parts = []
    if "overlap" in extra:
        parts.append(
            f"communication {extra['communication_us']:.1f} µs, computation "
            f"{extra['computation_us']:.1f} µs, overlap {extra['overlap']:.0%}"
        )
    others = {"gain_over_ring": "the ring", "gain_over_xla": "XLA's all-gather"}
    gains = [f"{extra[key]:.2f}x as {other}" for key, other in others.items() if key in extra]
    parts += [", ".join(gains).replace("x as ", "x as fast as ", 1)] * bool(gains)
    return "; ".join(parts)


def cases(devices: int | None = None) -> list[RingCase]:
    """Heads of Llama-3-8B; the longest prompt with a causal mask only.

    Tokens of a device are rounded down to what every schedule can cut into pieces of 16 and more.

    Args:
        devices: n; None: as many as there are.

    Raises:
        ValueError: n is not positive.
    """
    n = jax.device_count() if devices is None else devices
    if n < 1:
        raise ValueError(f"devices must be positive; got {n}")
    shape = {"model": "llama-3-8b", "n": n, "N": 32, "K": 8, "H": 128}
    pieces = max(n - 1, 1)
    multiple = 2 * pieces * 16
    return [
        *(
            RingCase(**shape, T=max(total // n // multiple, 1) * multiple, is_causal=causal)
            for total in _TOTALS
            for causal in (True, False)
            if causal or total < _LONGEST
        ),
        RingCase(model="ci", n=n, T=12 * pieces, N=4, K=2, H=16, tag="ci"),
    ]
