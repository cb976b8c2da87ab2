"""The one module through which kernels reach Mosaic GPU.

Pallas' Mosaic GPU interface may change with any JAX release, so every symbol that a kernel uses
is named here, and so is the one place that knows what the CPU interpreter cannot run.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.pallas.mosaic_gpu import core as _mgpu_core
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import (
    reset_gpu_interpret_mode_state,
)
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as _mosaic
from jax.experimental.pallas import mosaic_gpu as _mgpu

from jaxinfer.pallas_kernels.device import H100, DeviceSpec, use_device

Barrier = _mgpu.Barrier
ClusterBarrier = _mgpu.ClusterBarrier
CompilerParams = _mgpu.CompilerParams
Layout = _mgpu.Layout
LoweringSemantics = _mgpu.LoweringSemantics
SMEM = _mgpu.SMEM
SomeLayout = _mgpu_core.SomeLayout
async_store_smem = _mgpu.async_store_smem
barrier_arrive = _mgpu.barrier_arrive
barrier_wait = _mgpu.barrier_wait
broadcasted_iota = _mgpu.broadcasted_iota
commit_smem = _mgpu.commit_smem
copy_gmem_to_smem = _mgpu.copy_gmem_to_smem
copy_smem_to_gmem = _mgpu.copy_smem_to_gmem
kernel = _mgpu.kernel
layout_cast = _mgpu.layout_cast
load = _mgpu.load
set_max_registers = _mgpu.set_max_registers
wait_smem_to_gmem = _mgpu.wait_smem_to_gmem
wgmma = _mgpu.wgmma
wgmma_wait = _mgpu.wgmma_wait

# To type checkers both transforms are abstract, and an accumulator that `run_state` was given does
# not come back as an array.
ACC: Any = _mgpu.WGMMAAccumulatorRef
SwizzleTransform: Any = _mgpu.SwizzleTransform
TilingTransform: Any = _mgpu.TilingTransform

# Of float32 in shared memory: rows of 32 bytes lie as a warp's threads hold them in wgmma's layout.
FLOAT32_TILES = (TilingTransform((8, 8)), SwizzleTransform(32))

# Layout inference of the newer semantics finds no layout for `store_transposed`.
COMPILER = CompilerParams(approx_math=True, lowering_semantics=LoweringSemantics.Lane)

__all__ = [
    "ACC",
    "COMPILER",
    "FLOAT32_TILES",
    "SMEM",
    "Barrier",
    "ClusterBarrier",
    "CompilerParams",
    "Layout",
    "LoweringSemantics",
    "SomeLayout",
    "SwizzleTransform",
    "TilingTransform",
    "async_store_smem",
    "barrier_arrive",
    "barrier_wait",
    "broadcasted_iota",
    "commit_smem",
    "copy_gmem_to_smem",
    "copy_smem_to_gmem",
    "count_arrival",
    "drain",
    "interpret",
    "interpreting",
    "kernel",
    "layout_cast",
    "load",
    "lower_for_cuda",
    "pl",
    "rows_past_the_end",
    "set_max_registers",
    "store",
    "store_transposed",
    "tiled_layout",
    "wait_smem_to_gmem",
    "wgmma",
    "wgmma_add",
    "wgmma_wait",
]

# JAX 0.12 has it, and lowers an assignment, which reads what it overwrites, only where both read
# and store are optimal. JAX 0.11 has no such demand.
_store = getattr(_mgpu, "store", None)

_interpreting: list[bool] = [False]
_THREADS = 8  # of XLA, with which no kernel was seen to hang in the interpreter


def store(ref, value: jax.Array, *, optimized: bool = True) -> None:
    """`ref[...] = value` in the kernel of every JAX that is supported.

    Args:
        ref: Shared memory, or global memory with `optimized=False`.
        value: `[…]` of the reference's shape and dtype.
        optimized: Where JAX can tell, a store with bank conflicts is an error.
    """
    if _store is None:
        ref[...] = value
    else:
        _store(ref, value, optimized=optimized)


def store_transposed(smem, value: jax.Array) -> None:
    """`smem = valueᵀ`. From wgmma's layout that takes shuffles, but no way through other memory.

    Args:
        smem: `[rows, columns]` in shared memory.
        value: `[columns, rows]`.
    """
    store(smem.T, layout_cast(value, Layout.WGMMA_TRANSPOSED), optimized=False)


def rows_past_the_end(index, rows: int):
    """All `rows` rows of a tile, for a copy from an array that may have fewer.

    The copy gets zeros for the rest. Mosaic refuses a constant slice that reaches past the end.

    Args:
        index: Any traced number that is not negative.
        rows: Of the tile.
    """
    return pl.ds(lax.min(index, jnp.int32(0)), rows)


def drain(*barriers, uses, stages: int) -> None:
    """Wait for the last phases of a ring's barriers.

    Every completed phase of a barrier must have been observed when the kernel ends.

    Args:
        barriers: Of `stages` stages each.
        uses: How often a stage was used, all in all.
        stages: Of the ring.
    """

    @pl.loop(lax.max(uses - stages, jnp.int32(0)), uses)
    def _drain(i):
        slot = lax.rem(i, jnp.int32(stages))
        for barrier in barriers:
            barrier_wait(barrier.at[slot])


def count_arrival(counter, before) -> None:
    """Add 1 to a counter, after whatever this warpgroup stored and before whatever it loads next.

    Of several CTAs that count, the one that finds all others counted may read what they stored.
    The interpreter cannot run it.

    Args:
        counter: int32 scalar in global memory.
        before: `[1]` int32 in shared memory; gets what the counter was.
    """

    def count(_, counter, before):
        utils = _mosaic.utils
        # The fences of the one thread hold for all that the barriers order (cumulativity).
        utils.warpgroup_barrier()
        utils.inline_ptx(
            """{
                .reg .u32 found;
                @$2 atom.acq_rel.gpu.global.add.u32 found, [$0], 1;
                @$2 st.shared.u32 [$1], found;
            }
            """,
            utils.memref_ptr(counter),
            utils.memref_ptr(before),
            utils.single_thread_predicate(utils.ThreadSubset.WARPGROUP),
            has_side_effects=True,
        )
        utils.warpgroup_barrier()

    inline: Any = _mgpu.inline_mgpu(arg_types=(_mgpu.RefType(), _mgpu.RefType()))
    inline(count)(counter, before)


def interpreting() -> bool:
    """Whether kernels traced now run in the CPU interpreter (see `interpret`)."""
    return _interpreting[-1]


def _threads_of_xla() -> int:
    wanted = os.environ.get("NPROC", "")
    if wanted.isdecimal():
        return int(wanted)
    # Those that the process may use; not every system tells.
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable else os.cpu_count() or 1


@contextlib.contextmanager
def interpret(spec: DeviceSpec = H100, *, detect_races: bool = True) -> Iterator[None]:
    """Run Mosaic GPU kernels on the CPU, as if on `spec`, with race detection.

    For tests. Kernels are slow here (seconds for small shapes). Every barrier that waits blocks a
    thread of XLA's pool, and one no larger than that waits for ever; where it may be too small a
    warning says so. Its size is that of the environment variable `NPROC` when JAX starts, else the
    number of cores.
    """
    if (threads := _threads_of_xla()) < _THREADS:
        warnings.warn(
            f"the interpreter of kernels may wait for ever with the {threads} threads that XLA has "
            f"here: set NPROC={_THREADS} in the environment",
            RuntimeWarning,
            stacklevel=3,  # past contextlib, to the `with`
        )
    device = jax.sharding.AbstractDevice(
        device_kind=spec.name, platform="gpu", num_cores=spec.num_sms
    )
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    params = _mgpu.InterpretGPUParams(detect_races=detect_races)
    _interpreting.append(True)
    try:
        with (
            use_device(spec),
            jax.sharding.use_abstract_mesh(mesh),
            _mgpu.force_gpu_interpret_mode(params),
        ):
            yield
    finally:
        _interpreting.pop()
        reset_gpu_interpret_mode_state()  # a kernel that failed leaves what it knows of races


def lower_for_cuda(function, *args, spec: DeviceSpec = H100, **kwargs) -> str:
    """Lower `function` for CUDA on a machine without a GPU, and return the module's text.

    Runs layout inference and the Mosaic lowering, so that an illegal layout, tile shape or an
    overflow of shared memory shows up as an error. `args` may be `jax.ShapeDtypeStruct`.
    """
    with use_device(spec):
        traced = jax.jit(function).trace(*args, **kwargs)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def tiled_layout(
    tiles: tuple[tuple[int, ...], ...],
    *,
    warp_dims: tuple[int, ...],
    lane_dims: tuple[int, ...],
    vector_dim: int,
) -> SomeLayout:
    """A register layout by successive tilings; see `jax.experimental.mosaic.gpu.TiledLayout`."""
    return _mgpu.Layout.TILED(
        _mosaic.fragmented_array.Tiling(tiles),
        warp_dims=warp_dims,
        lane_dims=lane_dims,
        vector_dim=vector_dim,
    )


def wgmma_add(acc: jax.Array, lhs, rhs) -> jax.Array:
    """`acc + lhs @ rhs` for an accumulator carried in registers and operands in shared memory.

    The interpreter cannot start an accumulator from a value; there the product is added to it.
    """
    if interpreting():

        def product(ref):
            wgmma(ref, lhs, rhs)
            return ref[...]

        return acc + pl.run_scoped(product, ACC(acc.shape, acc.dtype))
    return pl.run_state(lambda ref: wgmma(ref, lhs, rhs))(ACC.init(acc))
