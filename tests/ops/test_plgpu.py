"""The interpreter under the kernels' tests: it must see races, and agree with the hardware."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.pallas_kernels import plgpu
from jaxinfer.pallas_kernels.device import H100, current_device
from jaxinfer.pallas_kernels.plgpu import pl
from tests.metrics import assert_dtype_close
from tests.ops.cases import normal, same_bits
from tests.ops.hopper import RaceError


def handed_over(x, *, wait: bool):
    """One warpgroup writes shared memory, another reads it, after a barrier or without one."""

    def body(x_ref, out_ref, *, shared, ready):
        thread = jax.lax.axis_index("thread")

        @pl.when(thread == 0)
        def _():
            shared[...] = x_ref[...]
            plgpu.barrier_arrive(ready)

        @pl.when(thread == 1)
        def _():
            if wait:
                plgpu.barrier_wait(ready)
            out_ref[...] = shared[...]
            if not wait:
                plgpu.barrier_wait(ready)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types={"shared": plgpu.SMEM(x.shape, x.dtype), "ready": plgpu.Barrier()},
        num_threads=2,
        thread_name="thread",
    )(x)


def test_a_read_that_nothing_orders_is_a_race(interpreter):
    x = normal(0, (128,))
    with pytest.raises(RaceError, match="RACE DETECTED"):
        interpreter.run(functools.partial(handed_over, wait=False), x)


def test_a_read_after_a_barrier_is_none(interpreter):
    x = normal(0, (128,))
    same_bits(interpreter.run(functools.partial(handed_over, wait=True), x), x)


def test_outputs_start_as_nan(interpreter):
    """What a kernel forgets to write fails comparisons."""

    def forget(x_ref, out_ref):
        out_ref[pl.ds(0, 64)] = x_ref[pl.ds(0, 64)]

    kernel = plgpu.kernel(forget, out_type=jax.ShapeDtypeStruct((128,), jnp.float32))
    out = interpreter.run(kernel, normal(0, (128,)))
    assert jnp.isnan(out[64:]).all()


def accumulate(a, b, start):
    """`start + a @ b` through `wgmma_add`, twice."""
    tiling = plgpu.TilingTransform((8, 64))
    swizzle = plgpu.SwizzleTransform(128)
    tiled = (tiling, swizzle)

    def body(a_ref, b_ref, start_ref, out_ref, *, a_smem, b_smem, ready):
        plgpu.copy_gmem_to_smem(a_ref, a_smem, ready)
        plgpu.copy_gmem_to_smem(b_ref, b_smem, ready)
        plgpu.barrier_wait(ready)
        acc = plgpu.load(start_ref, layout=plgpu.Layout.WGMMA, optimized=False)
        for _ in range(2):
            acc = plgpu.wgmma_add(acc, a_smem, b_smem)
        out_ref[...] = acc

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(start.shape, start.dtype),
        scratch_types={
            "a_smem": plgpu.SMEM(a.shape, a.dtype, transforms=tiled),
            "b_smem": plgpu.SMEM(b.shape, b.dtype, transforms=tiled),
            "ready": plgpu.Barrier(num_arrivals=2),
        },
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(a, b, start)


def test_wgmma_add_starts_from_its_accumulator(hopper):
    a, b = normal(0, (64, 64), "bfloat16"), normal(1, (64, 64), "bfloat16")
    start = normal(2, (64, 64))
    product = a.astype(jnp.float32) @ b.astype(jnp.float32)
    assert_dtype_close(hopper.run(accumulate, a, b, start), start + 2 * product, "float32")


def test_wgmma_add_lowers(h100):
    a = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
    start = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    assert "mosaic_gpu" in plgpu.lower_for_cuda(accumulate, a, a, start, spec=h100)


def test_interpreting_is_known_and_ends_with_its_block():
    assert not plgpu.interpreting()
    with plgpu.interpret(H100):
        assert plgpu.interpreting()
        assert current_device() is H100
    assert not plgpu.interpreting()


def test_too_few_threads_are_a_warning(monkeypatch):
    monkeypatch.setenv("NPROC", "2")
    with pytest.warns(RuntimeWarning, match="2 threads .* set NPROC=8"), plgpu.interpret():
        pass


def test_lowering_finds_too_much_shared_memory(h100):
    def body(x_ref, out_ref, *, scratch):
        scratch[...] = x_ref[...]
        out_ref[...] = scratch[...]

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((2**16,), jnp.float32),
        scratch_types={"scratch": plgpu.SMEM((2**16,), jnp.float32)},
    )
    with pytest.raises(ValueError, match="exceeds available shared memory"):
        plgpu.lower_for_cuda(kernel, jax.ShapeDtypeStruct((2**16,), jnp.float32), spec=h100)


@pytest.mark.parametrize("name", plgpu.__all__)
def test_every_exported_name_exists(name):
    assert getattr(plgpu, name) is not None
