"""What `add_rms_norm` refuses, and how it chooses."""

import re

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.pallas_kernels.add_rms_norm.api import add_rms_norm
from jaxinfer.pallas_kernels.device import CPU, H100, use_device
from jaxinfer.pallas_kernels.dispatch import NotSupported, choices, force_implementation


def call(x_shape=(2, 128), residual_shape=None, weight_shape=None, dtype="bfloat16", **options):
    residual = jnp.zeros(residual_shape or x_shape, options.pop("residual_dtype", dtype))
    weight = jnp.zeros(weight_shape or x_shape[-1:], dtype)
    return add_rms_norm(jnp.zeros(x_shape, dtype), residual, weight, **options)


@pytest.mark.parametrize(("options", "message"), [
    ({"weight_shape": (64,)}, "weight must have shape (128,); got (64,)"),
    ({"residual_shape": (1, 128)}, "residual must have the shape of x (2, 128); got (1, 128)"),
    ({"eps": -1e-6}, "eps must not be negative; got -1e-06"),
    ({"eps": float("nan")}, "eps must not be negative; got nan"),
    ({"implementation": "triton"}, "must be among ['mosaic', 'xla']; got 'triton'"),
], ids=["weight", "residual", "eps", "nan", "name"])  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_values_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(**options)


@pytest.mark.usefixtures("unchecked")
def test_types_that_do_not_fit():
    with pytest.raises(TypeError, match="x must be an array; got list"):
        add_rms_norm([[1.0]], None, jnp.ones(1))  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="must have one dtype; got bfloat16 and float32"):
        call(residual_dtype="float32")


@pytest.mark.parametrize(("options", "argument", "nearest"), [
    ({"dtype": "float32"}, "dtype float32", "bfloat16, float16"),
    ({"x_shape": (2, 192)}, "D = 192", "a multiple of 128, at most 16384"),
    ({"x_shape": (1, 16512)}, "D = 16512", "a multiple of 128, at most 16384"),
    ({"x_shape": (0, 128)}, "no rows", "at least one row"),
], ids=["dtype", "odd", "wide", "empty"])  # fmt: skip
def test_the_kernel_names_what_it_lacks(h100, options, argument, nearest):
    with pytest.raises(NotSupported) as error:
        call(**options, implementation="mosaic")
    assert (error.value.op, error.value.implementation) == ("add_rms_norm", "mosaic")
    assert (error.value.argument, error.value.nearest) == (argument, nearest)


def test_the_kernel_needs_hopper():
    with use_device(CPU), pytest.raises(NotSupported, match="device 'cpu'; supported: Hopper GPUs"):
        call(implementation="mosaic")


def test_several_that_cannot_serve(h100):
    with pytest.raises(ExceptionGroup):
        call(dtype="float32", implementation=("mosaic", "mosaic"))


def test_the_default_is_the_kernel_where_it_can_serve():
    for device, shape, expected in (
        (H100, (2, 128), "mosaic"), (H100, (2, 192), "xla"), (CPU, (2, 128), "xla"),
    ):  # fmt: skip
        with use_device(device):
            jax.eval_shape(lambda shape=shape: call(shape))
        assert choices()["add_rms_norm"].implementation == expected


def test_force_implementation(h100):
    with force_implementation("xla", op="add_rms_norm"):
        jax.eval_shape(call)
    assert choices()["add_rms_norm"].implementation == "xla"


def test_no_rows_are_no_error():
    normed, total = call((0, 128), implementation="xla")
    assert normed.shape == total.shape == (0, 128)
