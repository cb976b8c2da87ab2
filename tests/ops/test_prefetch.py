"""Which rows a kernel asks for ahead, and that nothing depends on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.pallas_kernels import plgpu
from jaxinfer.pallas_kernels.decode_attention.api import decode_attention
from jaxinfer.pallas_kernels.decode_attention.specs import DecodeSpec, make_inputs
from jaxinfer.pallas_kernels.dispatch import NotSupported, force_implementation
from jaxinfer.pallas_kernels.prefetch import choose_prefetch, plan_prefetch
from tests.ops.cases import inputs, same_bits, shapes_of
from tests.ops.decode_attention.calls import op

SPEC = DecodeSpec(model="small", B=2, S=1024, N=8, K=2, H=128)


def matrix(rows: int, columns: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, columns), jnp.bfloat16)


def rows_of(part) -> list[int]:
    rows = np.asarray(jax.vmap(part.row)(jnp.arange(part.wanted * 128, dtype=jnp.int32)))
    return rows[rows < part.rows].tolist()


def test_a_small_model_has_its_layer_asked_for():
    """SmolLM2's o, gate and up, down, and the next layer's qkv."""
    weights = [matrix(576, 576), matrix(576, 3072), matrix(1536, 576), matrix(576, 960)]
    parts = plan_prefetch(weights)
    for weight, part in zip(weights, parts, strict=True):
        assert rows_of(part) == list(range(weight.shape[0]))


def test_half_of_a_large_weight_is_asked_for_spread_over_it():
    """Llama-3-8B's o; for what comes after it there is no time."""
    weights = [matrix(4096, 4096), matrix(4096, 28672)]
    o, gate_up = plan_prefetch(weights)
    rows = rows_of(o)
    assert len(set(rows)) == len(rows) == 2048  # 16 MiB
    assert {row // 128 for row in rows} == set(range(0, 32, 2))
    assert gate_up.wanted == 0
    with force_implementation("ask", op="prefetch"):
        asked = jax.eval_shape(lambda *arrays: choose_prefetch(arrays), *weights)
    assert [array.shape for array in asked] == [(4096, 4096)]


def test_rows_of_no_whole_instruction_are_left_out():
    assert [part.wanted for part in plan_prefetch([matrix(64, 12), matrix(64, 16)])] == [0, 1]


@pytest.mark.parametrize("forced", ["ask", "none", None])
def test_it_is_asked_for_where_that_is_forced(h100, forced):
    def call(weight, *arrays):
        return op("mosaic", SPEC, prefetch=[weight])(*arrays)

    arrays = (matrix(4096, 4096), *shapes_of(make_inputs, SPEC))
    if forced is None:
        text = plgpu.lower_for_cuda(call, *arrays, spec=h100)
    else:
        with force_implementation(forced, op="prefetch"):
            text = plgpu.lower_for_cuda(call, *arrays, spec=h100)
    assert ("cp.async.bulk.prefetch.L2" in text) == (forced == "ask")


@pytest.mark.gpu
def test_results_do_not_depend_on_it(hopper_gpu):
    arrays = inputs(make_inputs, SPEC, 3)
    weight = jnp.ones((300, 512), jnp.bfloat16)
    want = hopper_gpu.run(op("mosaic", SPEC), *arrays, num_sms=4)

    def call(weight, *arrays):
        with force_implementation("ask", op="prefetch"):
            return op("mosaic", SPEC, prefetch=[weight])(*arrays)

    same_bits(hopper_gpu.run(call, weight, *arrays, num_sms=4), want)


def test_the_interpreter_cannot_ask(interpreter):
    def call(*arrays):
        with force_implementation("ask", op="prefetch"):
            return op("mosaic", SPEC, prefetch=[jnp.ones((8, 512), jnp.bfloat16)])(*arrays)

    with pytest.raises(NotSupported, match="the interpreter"):
        interpreter.run(call, *inputs(make_inputs, SPEC, 5))


def test_it_must_be_matrices():
    arrays = inputs(make_inputs, SPEC, 4)
    with pytest.raises(ValueError, match=r"prefetch must hold matrices; got shape \(3,\)"):
        decode_attention(*arrays, prefetch=[jnp.ones(3)])
