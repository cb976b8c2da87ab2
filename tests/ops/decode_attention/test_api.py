"""What `decode_attention` refuses, and how it chooses."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.pallas_kernels.decode_attention.api import decode_attention
from jaxinfer.pallas_kernels.decode_attention.config import heuristic_config
from jaxinfer.pallas_kernels.decode_attention.mosaic_sm90 import Config
from jaxinfer.pallas_kernels.device import CPU, H100, use_device
from jaxinfer.pallas_kernels.dispatch import NotSupported, choices, force_implementation
from tests.ops.cases import normal, same_bits


def arguments(B=2, T=1, N=4, K=2, H=64, page_size=16, P=4, M=2, dtype="bfloat16") -> dict:
    pages = (P, K, page_size, H)
    return {
        "query": normal(0, (B, T, N, H), dtype), "k_pages": normal(1, pages, dtype),
        "v_pages": normal(2, pages, dtype), "page_table": jnp.zeros((B, M), jnp.int32),
        "lengths": jnp.full((B,), 5, jnp.int32),
    }  # fmt: skip


def shape(*sizes, dtype="bfloat16"):
    return np.zeros(sizes, jnp.dtype(dtype))


WRONG = {
    "rank": ({"query": shape(2, 4, 64)}, "query must have 4 dimensions; got shape (2, 4, 64)"),
    "table rank": ({"page_table": shape(2, dtype="int32")}, "page_table must have 2 dimensions"),
    "lengths rank": ({"lengths": shape(2, 1, dtype="int32")}, "lengths must have 1 dimensions"),
    "no pages": ({"k_pages": shape(0, 2, 16, 64)}, "k_pages must not be empty"),
    "pages": ({"v_pages": shape(5, 2, 16, 64)}, "k_pages and v_pages must have one shape"),
    "tokens": ({"query": shape(2, 9, 4, 64)}, "takes 1 to 8 query tokens (use attention for more"),
    "head_dim": ({"query": shape(2, 1, 4, 32)}, "must agree; got 32 and 64"),
    "heads": ({"query": shape(2, 1, 3, 64)}, "multiple of KV heads; got N=3 and K=2"),
    "table rows": ({"page_table": shape(3, 2, dtype="int32")}, "one row per request (B=2)"),
    "lengths rows": ({"lengths": shape(1, dtype="int32")}, "one row per request (B=2)"),
    "softcap": ({"logits_softcap": 0.0}, "logits_softcap must be positive; got 0.0"),
    "softmax": ({"softmax": "fast"}, "softmax must be one of ('auto', 'online', 'unified')"),
    "phi": ({"phi": np.zeros(3)}, "phi must have one number per query head (4); got (3,)"),
    "phi inf": ({"phi": np.full(4, np.inf)}, "phi must be finite"),
    "phi online": ({"phi": np.zeros(4), "softmax": "online"}, "phi is for the unified softmax"),
    "scale": ({"scale": float("inf")}, "scale must be finite; got inf"),
    "window": ({"local_window_size": -1}, "local_window_size must not be negative; got -1"),
    "left": ({"local_window_size": (-1, 0)}, "must not be negative; got (-1, 0)"),
    "right": ({"local_window_size": (4, -1)}, "must not be negative; got (4, -1)"),
    "name": ({"implementation": "cuda"}, "must be among ['mosaic', 'xla']; got 'cuda'"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.usefixtures("unchecked")
def test_values_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        decode_attention(**arguments() | changes)


@pytest.mark.parametrize(("changes", "message"), [
    ({"page_table": shape(2, 2, dtype="float32")}, "page_table must be integers; got float32"),
    ({"lengths": shape(2, dtype="float32")}, "lengths must be integers; got float32"),
    ({"query": shape(2, 1, 4, 64, dtype="float16")}, "got float16, bfloat16, bfloat16"),
    ({name: shape(2, 1, 4, 64, dtype="int8") for name in ("query", "k_pages", "v_pages")},
     "must be float32, bfloat16 or float16; got int8"),
], ids=["table", "lengths", "mixed", "integers"])  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_types_that_do_not_fit(changes, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        decode_attention(**arguments() | changes)


@pytest.mark.parametrize(("changes", "argument", "nearest"), [
    ({"dtype": "float32"}, "dtype float32", "bfloat16, float16"),
    ({"H": 80}, "head_dim 80", "64, 128, 256"),
    ({"page_size": 48}, "page_size 48", "16, 32, 64, 128"),
    ({"T": 8, "N": 18}, "72 query rows (T·N/K) per KV head", "at most 64"),
], ids=["dtype", "head_dim", "page_size", "rows"])  # fmt: skip
def test_the_kernel_names_what_it_lacks(h100, changes, argument, nearest):
    with pytest.raises(NotSupported) as error:
        decode_attention(**arguments(**changes), implementation="mosaic")
    assert (error.value.op, error.value.implementation) == ("decode_attention", "mosaic")
    assert (error.value.argument, error.value.nearest) == (argument, nearest)


@pytest.mark.parametrize("device", [CPU, dataclasses.replace(H100, name="B200", capability=100)])
def test_the_kernel_needs_hopper(device):
    with use_device(device), pytest.raises(NotSupported, match="Hopper GPUs") as error:
        decode_attention(**arguments(), implementation="mosaic")
    assert error.value.argument == f"device {device.name!r}"


def test_several_that_cannot_serve(h100):
    """Of several by name, each says why; xla takes what the kernel cannot."""
    call = functools.partial(decode_attention, **arguments(page_size=48))
    with pytest.raises(ExceptionGroup) as error:
        call(implementation=("mosaic", "mosaic"))
    assert all(isinstance(reason, NotSupported) for reason in error.value.exceptions)
    call(implementation=("mosaic", "xla"))
    assert choices()["decode_attention"].implementation == "xla"
    assert "page_size 48" in choices()["decode_attention"].passed_over[0]


def test_the_default_is_the_kernel_on_hopper_and_xla_elsewhere():
    for device, expected in ((H100, "mosaic"), (CPU, "xla")):
        with use_device(device):
            jax.eval_shape(lambda: decode_attention(**arguments()))
        assert choices()["decode_attention"].implementation == expected


def test_force_implementation(h100):
    with force_implementation("xla", op="decode_attention"):
        jax.eval_shape(lambda: decode_attention(**arguments()))
    assert choices()["decode_attention"].implementation == "xla"


def test_windows_as_int_and_tuple_mean_the_same():
    """Nothing lies to the right of the newest token, so its side does not matter."""
    call = functools.partial(decode_attention, **arguments(dtype="float32"), implementation="xla")
    want = call(local_window_size=3)
    for window in ((3, 0), (3, 3), (3, 9)):
        same_bits(call(local_window_size=window), want)
    assert not jnp.array_equal(call(local_window_size=2), want)


def test_scale_defaults_to_the_head_dimension():
    call = functools.partial(decode_attention, **arguments(dtype="float32"), implementation="xla")
    same_bits(call(scale=0.125), call())


def test_without_residual_only_the_output_comes_back():
    call = functools.partial(decode_attention, **arguments(), implementation="xla")
    same_bits(call(), call(return_residual=True)[0])


def test_lengths_change_without_recompilation():
    traces = []

    @jax.jit
    def call(arrays):
        traces.append(1)
        return decode_attention(**arrays, implementation="xla")

    for lengths in ([5, 1], [0, 32]):
        call(arguments() | {"lengths": jnp.array(lengths, jnp.int32)})
    assert len(traces) == 1


@pytest.mark.parametrize(("changes", "message"), [
    ({"block": 32}, "block must be 64, 128 or 256; got 32"),
    ({"stages": 1}, "stages must be at least 2; got 1"),
    ({"ctas_per_sm": 0}, "ctas_per_sm must be positive; got 0"),
])  # fmt: skip
def test_tilings_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)


def test_a_tiling_that_does_not_fit_is_refused_by_name(h100):
    config = Config(block=128, stages=6)
    with pytest.raises(ValueError, match=r"config must fit 232448 bytes of shared memory; got .*"):
        decode_attention(**arguments(H=256), implementation="mosaic", config=config)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("rows", [8, 64])
def test_the_heuristic_fits_the_device(rows, head_dim):
    config = heuristic_config(H100, rows=rows, head_dim=head_dim, page_size=64)
    assert config.smem_bytes(rows=rows, head_dim=head_dim) <= H100.smem_bytes
    ring = config.stages * 2 * config.block * head_dim * 2  # keys and values of 16 bits
    assert ring == (128 << 10)


def test_the_heuristic_says_when_nothing_fits():
    tiny = dataclasses.replace(H100, smem_bytes=48 * 1024)
    with pytest.raises(ValueError, match="no tiling fits 49152 bytes"):
        heuristic_config(tiny, rows=64, head_dim=256, page_size=64)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint32"])
def test_integers_of_any_width(dtype):
    """Lengths shorter than the query tokens, and window edges before the first key."""
    given = arguments(T=3, M=4) | {"lengths": jnp.array([1, 40]), "local_window_size": 50}
    narrow = {name: given[name].astype(dtype) for name in ("page_table", "lengths")}
    call = functools.partial(decode_attention, return_residual=True, implementation="xla")
    same_bits(call(**given | narrow), call(**given))


def test_counters_of_another_shape_are_refused():
    counters = jax.new_ref(jnp.zeros((3,), jnp.int32))
    with pytest.raises(ValueError, match=r"counters must be a reference to \[\d+\] int32"):
        decode_attention(**arguments(), counters=counters)


@pytest.mark.usefixtures("unchecked")
def test_counters_that_are_no_reference_are_refused():
    zeros: Any = jnp.zeros((4,), jnp.int32)
    with pytest.raises(TypeError, match="counters must be a reference"):
        decode_attention(**arguments(), counters=zeros)
