"""Sequences on a few of eight CPU devices, and what must come out."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxinfer.sharding import Schedule, build, place, ring_attention, unplace
from jaxinfer.sharding.sequence_parallel.placement import Placement, chunks_per_rank
from tests.metrics import assert_dtype_close
from tests.ops import oracle
from tests.ops.cases import quick_compilation


def mesh_of(*sizes: int, names: tuple[str, ...] = ("seq", "other")) -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
    return Mesh(devices, names[: len(sizes)])


def schedules(n: int) -> dict[str, Schedule]:
    """One schedule of every kind that exists for n ranks."""
    found = {kind: build(kind, n) for kind in ("ring", "full_link", "all_gather")}
    if n not in (4, 6):
        found["hamilton"] = build("hamilton", n)
    if n in (2, 4, 8):
        found["xor"] = build("xor", n)
    per_node = {2: 1, 3: 1, 4: 2, 5: 1, 6: 2, 7: 1, 8: 4}[n]
    found["multinode"] = build("multinode", n, ranks_per_node=per_node)
    return found


def numbers(shape: tuple[int, ...], seed: int, dtype: Any = "float32") -> jax.Array:
    """Normal random numbers, made by NumPy: nothing to compile."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def qkv(S: int, N: int, K: int, *, B: int = 2, H: int = 8, dtype: Any = "float32"):
    shapes = ((B, S, N, H), (B, S, K, H), (B, S, K, H))
    return tuple(numbers(shape, seed, dtype) for seed, shape in enumerate(shapes))


@functools.cache
def order(placement: Placement, n: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Where `place` and `unplace` take each token from: NumPy reorders arrays by it."""
    at = jnp.arange(tokens)
    there, back = (np.asarray(move(at, placement, n, axis=0)) for move in (place, unplace))
    return there, back


def check(got, arrays, lengths=None, **options) -> None:
    """Compare output and log-sum-exp with float64 on one device."""
    clean = [np.nan_to_num(np.asarray(x, np.float64)) for x in arrays]
    want = oracle.attention(
        *clean, query_seq_lengths=lengths, key_value_seq_lengths=lengths, **options
    )
    out, lse = got
    assert out.dtype == arrays[0].dtype
    assert lse.dtype == jnp.float32
    assert_dtype_close(out, want[0], arrays[0].dtype, "output")
    assert_dtype_close(lse, want[1], arrays[0].dtype, "log-sum-exp")


def run_ring(
    n: int, schedule: Schedule | str | None, *, placement, is_causal: bool = True, lengths=None,
    transport=None, tokens: int | None = None, heads: tuple[int, int] = (4, 2), B: int = 2,
    dtype: Any = "float32", **options: Any,
) -> None:  # fmt: skip
    """`ring_attention` over n devices equals attention on one."""
    if tokens is None:
        pieces = schedule.pieces_per_rank if isinstance(schedule, Schedule) else 1
        tokens = chunks_per_rank(placement) * pieces
    arrays = qkv(n * tokens, *heads, B=B, dtype=dtype)
    if lengths is not None:  # padding may hold anything
        real = np.arange(n * tokens) < np.asarray(lengths)[:, None]
        arrays = tuple(np.where(real[:, :, None, None], x, x.dtype.type("nan")) for x in arrays)
        lengths = jnp.asarray(lengths, jnp.int32)
    there, back = order(placement, n, n * tokens)

    def local(query, key, value):
        return ring_attention(
            query, key, value, axis_name="seq", schedule=schedule, placement=placement,
            is_causal=is_causal, lengths=lengths, transport=transport, return_residual=True,
            **options,
        )  # fmt: skip

    spec = P(None, "seq")
    call = jax.jit(jax.shard_map(
        local, mesh=mesh_of(n), in_specs=spec, out_specs=spec, check_vma=False
    ))  # fmt: skip
    with quick_compilation():
        result = call(*(np.asarray(x)[:, there] for x in arrays))
    names = ("scale", "local_window_size", "logits_softcap")
    check([np.asarray(x)[:, back] for x in result], arrays, lengths, is_causal=is_causal,
          **{name: options[name] for name in names if name in options})  # fmt: skip
