"""What `matmul` refuses, and how it chooses."""

import dataclasses
import logging
import re

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.pallas_kernels import tuning
from jaxinfer.pallas_kernels.device import CPU, H100, use_device
from jaxinfer.pallas_kernels.dispatch import NotSupported, choices, force_implementation
from jaxinfer.pallas_kernels.matmul import config as configs
from jaxinfer.pallas_kernels.matmul.api import matmul
from jaxinfer.pallas_kernels.matmul.shape import Config


def call(M=16, K=128, N=128, *, x_shape=None, bias=None, dtype="bfloat16", **options):
    weight = jnp.zeros((K, N), options.pop("weight_dtype", dtype))
    return matmul(jnp.zeros(x_shape or (M, K), dtype), weight, bias, **options)


@pytest.mark.parametrize(("options", "message"), [
    ({"x_shape": (2, 64)}, "the last dimension of x must be K = 128; got shape (2, 64)"),
    ({"bias": jnp.zeros(64, "bfloat16")}, "bias must have shape (128,); got (64,)"),
    ({"residual": jnp.zeros((16, 64), "bfloat16")},
     "residual must have the result's shape (16, 128); got (16, 64)"),
    ({"gate": "relu"}, "gate must be among ('silu', 'gelu_tanh'); got 'relu'"),
    ({"N": 129, "gate": "silu"}, "must have an even number of columns; got N = 129"),
    ({"implementation": "triton"}, "must be among ['mosaic', 'xla']; got 'triton'"),
], ids=["x", "bias", "residual", "gate", "odd", "name"])  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_values_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(**options)


@pytest.mark.usefixtures("unchecked")
def test_a_weight_of_three_dimensions():
    with pytest.raises(ValueError, match="weight must have 2 dimensions"):
        matmul(jnp.zeros((1, 2)), jnp.zeros((1, 2, 2)))


@pytest.mark.parametrize("options", [
    {"weight_dtype": "float32"}, {"bias": jnp.zeros(128, "float32")},
    {"residual": jnp.zeros((16, 128), "float32")},
], ids=["weight", "bias", "residual"])  # fmt: skip
def test_types_that_differ(options):
    with pytest.raises(TypeError, match=r"must have one dtype; got bfloat16 and .*float32"):
        call(**options)


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64", "float8_e4m3fn"])
@pytest.mark.usefixtures("unchecked")
def test_types_that_nothing_multiplies(dtype):
    with pytest.raises(TypeError, match=f"x must be float32, bfloat16 or float16; got {dtype}"):
        matmul(jnp.zeros((1, 2), dtype), jnp.zeros((2, 2), dtype))


@pytest.mark.parametrize(("changes", "message"), [
    ({"x": [[1.0]]}, "x must be an array; got list"),
    ({"weight": None}, "weight must be an array; got None"),
    ({"bias": [1.0]}, "bias must be an array; got list"),
    ({"config": 3}, "matmul.shape.Config; got int"),
], ids=["x", "weight", "bias", "config"])  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_array(changes, message):
    given = {"x": jnp.zeros((1, 1)), "weight": jnp.zeros((1, 1))} | changes
    with pytest.raises(TypeError, match=message):
        matmul(**given)


@pytest.mark.parametrize(("options", "argument", "nearest"), [
    ({"dtype": "float32"}, "dtype float32", "bfloat16, float16"),
    ({"M": 129}, "129 tokens", "1 to 128"),
    ({"x_shape": (0, 128)}, "0 tokens", "1 to 128"),
    ({"K": 96}, "K = 96 and 128 columns", "multiples of 64 and 64"),
    ({"N": 96}, "K = 128 and 96 columns", "multiples of 128 and 64"),
], ids=["dtype", "many", "none", "depth", "columns"])  # fmt: skip
def test_the_kernel_names_what_it_lacks(h100, options, argument, nearest):
    with pytest.raises(NotSupported) as error:
        call(**options, implementation="mosaic")
    assert (error.value.op, error.value.implementation) == ("matmul", "mosaic")
    assert (error.value.argument, error.value.nearest) == (argument, nearest)


def test_the_kernel_needs_hopper():
    with use_device(CPU), pytest.raises(NotSupported, match="device 'cpu'; supported: Hopper GPUs"):
        call(implementation="mosaic")


def test_a_device_without_room(h100):
    small = dataclasses.replace(h100, smem_bytes=20_000)
    with use_device(small), pytest.raises(NotSupported, match="tokens in the shared memory of"):
        call(implementation="mosaic")


@pytest.mark.parametrize("field", [
    {"block_n": 96}, {"block_k": 32}, {"block_k": 96}, {"stages": 1}, {"cluster": 4}, {"split": 3},
], ids=str)  # fmt: skip
def test_tilings_that_do_not_exist(field):
    (name,) = field
    with pytest.raises(ValueError, match=f"{name} must be .*; got {field[name]}"):
        Config(**field)


def test_pairs_do_not_share_depth():
    with pytest.raises(ValueError, match="cluster must be 1 where split is not; got 2"):
        Config(cluster=2, split=2)


def test_more_ctas_than_the_depth_has_parts(h100):
    config = Config(block_k=64, split=4)
    with pytest.raises(NotSupported, match="K = 128, split 4 times; supported: 256"):
        call(implementation="mosaic", config=config)


def chosen(M, K, N, device=H100) -> str:
    with use_device(device):
        jax.eval_shape(lambda: call(M, K, N))
    return choices()["matmul"].implementation


def heuristic(M, N, *, gated) -> str:
    return configs.heuristic(H100, M=M, K=4096, N=N, gated=gated, transposed=False).order[0]


def test_without_a_measurement_the_heuristic_decides(monkeypatch):
    monkeypatch.setattr(tuning, "lookup", lambda *_: [])
    assert chosen(64, 4096, 4096) == "mosaic"
    assert chosen(8, 4096, 4096) == "mosaic"
    assert heuristic(8, 28_672, gated=True) == "xla"  # XLA reads as fast
    assert heuristic(16, 28_672, gated=True) == "mosaic"
    assert heuristic(8, 256, gated=True) == "mosaic"  # a launch decides
    assert chosen(64, 128, 128) == "mosaic"
    assert chosen(64, 120, 128) == "xla"  # no tile divides it
    assert chosen(256, 4096, 4096) == "xla"  # not flat
    assert chosen(64, 4096, 4096, CPU) == "xla"


@pytest.mark.parametrize("name", ["xla", "mosaic"])
def test_a_measurement_overrules_the_heuristic(monkeypatch, name):
    asked = []
    tiling = {"block_n": 64, "block_k": 64, "stages": 3, "cluster": 2}

    def lookup(op, device, key):
        asked.append((op, device.key, key))
        return [("file", {"implementation": name, "config": tiling})]

    monkeypatch.setattr(tuning, "lookup", lookup)
    options = {"M": 40, "K": 128, "N": 128, "gated": True, "transposed": False}
    choice = configs.choose_config(H100, **options)
    assert choice.order[0] == name
    assert choice.config is not None
    found = dataclasses.asdict(choice.config)
    assert {name: found[name] for name in tiling} == tiling
    assert asked == [("matmul", "nvidia_h100_80gb_hbm3", "m64 k128 n128 gated")]


DAMAGED = {
    "empty": {},
    "no implementation": {"config": {"block_n": 64}},
    "another implementation": {"implementation": "triton"},
    "unknown field": {"implementation": "mosaic", "config": {"block_m": 64}},
    "impossible": {"implementation": "mosaic", "config": {"block_n": 96}},
    "a fraction": {"implementation": "mosaic", "config": {"stages": 2.5}},
    "text": {"implementation": "mosaic", "config": {"block_k": "128"}},
    "a list": {"implementation": "mosaic", "config": [64, 128]},
    "too large": {"implementation": "mosaic", "config": {"block_n": 128, "stages": 12}},
    "times in a list": {"implementation": "mosaic", "us": [1.0, 2.0]},
    "times as text": {"implementation": "mosaic", "us": {"xla": "fast", "mosaic": 2.0}},
}


@pytest.mark.parametrize("entry", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_measurement_leaves_the_heuristic(monkeypatch, caplog, entry):
    options = {"M": 64, "K": 4096, "N": 8192, "gated": True, "transposed": False}
    monkeypatch.setattr(tuning, "lookup", lambda *_: [])
    want = configs.choose_config(H100, **options)
    monkeypatch.setattr(tuning, "lookup", lambda *_: [("nvidia/matmul.json", entry)])
    monkeypatch.setattr(tuning, "_ignored", set())
    for _ in range(2):
        assert configs.choose_config(H100, **options) == want
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "entry 'm64 k4096 n8192 gated'" in record.getMessage()
    assert "nvidia/matmul.json" in record.getMessage()


def test_a_tiling_that_does_not_fit_is_refused_by_name(h100):
    config = Config(block_n=128, block_k=128, stages=12)
    message = r"config must fit 232448 bytes of shared memory; got .* for 16 tokens: use fewer"
    with pytest.raises(ValueError, match=message):
        call(implementation="mosaic", config=config)


def test_force_implementation(h100):
    with force_implementation("xla", op="matmul"):
        jax.eval_shape(lambda: call(64, 4096, 4096))
    assert choices()["matmul"].implementation == "xla"


def test_a_result_in_float32_is_not_rounded():
    x, weight = jnp.ones((2, 64), "bfloat16"), jnp.ones((64, 64), "bfloat16").at[0].set(1 / 3)
    rounded, exact = matmul(x, weight), matmul(x, weight, out_dtype=jnp.float32)
    assert (rounded.dtype, exact.dtype) == (jnp.bfloat16, jnp.float32)
    assert exact[0, 0] == 63 + weight[0, 0].astype(jnp.float32) != rounded[0, 0]
    residual = jnp.full((2, 64), 1 / 3, "bfloat16")
    assert matmul(x, weight, None, residual, out_dtype=jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.float16, "nonsense"])
def test_a_result_of_another_dtype_is_refused(dtype):
    x, weight = jnp.ones((2, 64), "bfloat16"), jnp.ones((64, 64), "bfloat16")
    with pytest.raises(ValueError, match="out_dtype must be float32 or that of x, bfloat16; got"):
        matmul(x, weight, out_dtype=dtype)
