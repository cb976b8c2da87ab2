"""Attention over a sequence that is sharded over the devices: schedules, transports, and XLA's own.

One row is a call of the whole group, by the clock of the host: a schedule and transport, what the
cost model takes (`dispatch`), and an all-gather of keys and values before one attention, as one
writes it in plain JAX (`xla`). Rows of a schedule also have the time of its exchanges alone, of its
attention alone, and the share of the shorter one that the longer one hides.
"""

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

from bench.case import Measurement
from bench.gate import check
from jaxinfer.pallas_kernels.attention.api import attention
from jaxinfer.pallas_kernels.device import current_device
from jaxinfer.pallas_kernels.dispatch import NotSupported
from jaxinfer.sharding.kinds import build
from jaxinfer.sharding.schedule import Schedule
from jaxinfer.sharding.sequence_parallel.exchange import EXCHANGES
from jaxinfer.sharding.sequence_parallel.placement import Placement, place, unplace
from jaxinfer.sharding.sequence_parallel.ring import ring_attention

_AXIS = "ranks"
_CALLS = 4  # in flight together: the host's part of a call is not the device's
# Schedule and transport; those that a number of devices does not have are reported as such.
_WAYS = {
    "ring": ("ring", "ppermute"),
    "ring-all_to_all": ("ring", "all_to_all"),
    "hamilton-all_to_all": ("hamilton", "all_to_all"),
    "full_link-all_to_all": ("full_link", "all_to_all"),
    "xor-all_to_all": ("xor", "all_to_all"),
    "full_link-collective_group": ("full_link", "collective_group"),
    "heads-all_gather": ("all_gather", "all_gather"),
}


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
        size = jnp.dtype(self._dtype).itemsize
        return 2 * size * self.T * self.H * (self.N + self.n * self.K)

    @property
    def implementations(self) -> tuple[str, ...]:
        """The cost model's choice, every schedule, and XLA."""
        return ("dispatch", *_WAYS, "xla")

    @property
    def _dtype(self) -> str:
        return "float32" if current_device().platform == "cpu" else "bfloat16"

    @property
    def _placement(self) -> Placement:
        return "zigzag" if self.is_causal else "contiguous"

    def measure(self, implementation: str, *, repeats: int) -> Measurement:
        """Check against one device, then time; see `Case.measure`."""
        if jax.device_count() < self.n or self.n < 2:
            raise NotSupported(
                "ring_attention", implementation, f"{jax.device_count()} devices", "2 or more"
            )
        arrays = self._arrays()
        options: dict[str, Any] = {"placement": self._placement, "is_causal": self.is_causal}
        ours: Any = functools.partial(ring_attention, axis_name=_AXIS, **options)
        if implementation == "xla":
            call = self._sharded(self._gathered)
            placed = self._put(arrays, "contiguous")
            return self._measured(call, placed, arrays, "contiguous", repeats, {})
        placed = self._put(arrays, self._placement)
        if implementation == "dispatch":
            call = self._sharded(ours)
            return self._measured(call, placed, arrays, self._placement, repeats, {})
        kind, transport = _WAYS[implementation]
        schedule = self._schedule(kind, implementation)
        call = self._sharded(functools.partial(ours, schedule=schedule, transport=transport))
        extra = {}
        if transport in EXCHANGES:
            alone = functools.partial(_exchanges, schedule, transport)
            communication = _median(_times(self._sharded(alone), placed, repeats))
            # The attention of the same steps, on pieces that need not be fetched.
            with mock.patch.dict(EXCHANGES, {transport: _no_exchange}):
                here = functools.partial(ours, schedule=schedule, transport=transport)
                computation = _median(_times(self._sharded(here), placed, repeats))
            extra = {"communication_us": communication, "computation_us": computation}
        return self._measured(call, placed, arrays, self._placement, repeats, extra)

    def _schedule(self, kind: str, implementation: str) -> Schedule:
        try:
            if kind == "all_gather":
                return build(kind, self.n, pieces=2 if self.K % 2 == 0 else 1)
            return build(kind, self.n)
        except ValueError as error:
            raise NotSupported(
                "ring_attention", implementation, f"{self.n} devices ({error})", "others"
            ) from None

    def _measured(
        self, call: Callable[..., Any], placed: list[jax.Array], arrays: list[jax.Array],
        placement: Placement, repeats: int, extra: dict[str, float],
    ) -> Measurement:  # fmt: skip
        start = time.perf_counter()
        got = jax.block_until_ready(call(*placed))
        compile_s = time.perf_counter() - start
        whole = unplace(jnp.asarray(jax.device_get(got)), placement, self.n)
        error = check(whole, self._want(arrays), self._dtype)
        times = _times(call, placed, repeats)
        if extra:
            hidden = extra["communication_us"] + extra["computation_us"] - _median(times)
            extra["overlap"] = hidden / min(extra["communication_us"], extra["computation_us"])
        rate = self.n * self.T * 1e6 / _median(times)
        return Measurement.of(
            times, rel_rms=error, compile_s=compile_s, extra={**extra, "tokens_per_s": rate}
        )

    def _arrays(self) -> list[jax.Array]:
        keys = jax.random.split(jax.random.key(0), 3)
        heads = (self.N, self.K, self.K)
        return [
            jax.random.normal(key, (1, self.n * self.T, h, self.H), self._dtype)
            for key, h in zip(keys, heads, strict=True)
        ]

    def _want(self, arrays: list[jax.Array]) -> np.ndarray:
        wide = (x.astype(jnp.float32) for x in arrays)
        call = jax.jit(functools.partial(attention, implementation="xla", is_causal=self.is_causal))
        return np.asarray(call(*wide))

    @property
    def _mesh(self) -> Mesh:
        return Mesh(np.asarray(jax.devices()[: self.n]), (_AXIS,))

    def _put(self, arrays: list[jax.Array], placement: Placement) -> list[jax.Array]:
        sharding = NamedSharding(self._mesh, P(None, _AXIS))
        return [jax.device_put(place(x, placement, self.n), sharding) for x in arrays]

    def _sharded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        spec = P(None, _AXIS)
        return jax.jit(
            jax.shard_map(function, mesh=self._mesh, in_specs=spec, out_specs=spec, check_vma=False)
        )

    def _gathered(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        """All keys and values come first, then one attention."""
        key, value = (lax.all_gather(x, _AXIS, axis=1, tiled=True) for x in (key, value))
        if not self.is_causal:
            return attention(query, key, value)
        offset = jnp.full((1,), lax.axis_index(_AXIS) * self.T, jnp.int32)
        return attention(query, key, value, is_causal=True, q_offset=offset)


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
        pieces = EXCHANGES[transport](schedule, step, own, pieces, _AXIS)
        total = total + pieces.ravel()[0].astype(jnp.float32)
    return jnp.broadcast_to(total, query.shape[:2])


def _no_exchange(
    schedule: Schedule, step: int, own: jax.Array, current: jax.Array | None, axis_name: Any
) -> jax.Array:
    """The shape of what a step brings, out of what is here."""
    del current, axis_name
    # Of every step another rotation, so that no step is taken for a repetition of the one before.
    lanes = (own[lane % len(own)] for lane in range(schedule.num_lanes))
    return jnp.stack([jnp.roll(piece, step + 1, axis=-2) for piece in lanes])


def _times(call: Callable[..., Any], arrays: list[jax.Array], repeats: int) -> list[float]:
    """µs of a call, of several that are in flight together."""
    jax.block_until_ready(call(*arrays))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready([call(*arrays) for _ in range(_CALLS)])
        times.append((time.perf_counter() - start) * 1e6 / _CALLS)
    return times


def _median(times: list[float]) -> float:
    return float(np.median(times))


def cases(devices: int | None = None) -> list[RingCase]:
    """Heads of Llama-3-8B.

    Args:
        devices: n; None: as many as there are.
    """
    n = jax.device_count() if devices is None else devices
    shape = {"model": "llama-3-8b", "n": n, "N": 32, "K": 8, "H": 128}
    return [
        *(RingCase(**shape, T=T, is_causal=c) for T in (4096, 16384) for c in (True, False)),
        RingCase(model="ci", n=n, T=12 * max(n - 1, 1), N=4, K=2, H=16, tag="ci"),
    ]
