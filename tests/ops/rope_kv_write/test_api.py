"""What `rope_kv_write` refuses, and how it chooses."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.pallas_kernels.device import CPU, H100, use_device
from jaxinfer.pallas_kernels.dispatch import NotSupported, choices, force_implementation
from jaxinfer.pallas_kernels.rope_kv_write.api import rope_kv_write


def zeros(*sizes, dtype="bfloat16"):
    return np.zeros(sizes, jnp.dtype(dtype))


def arguments(B=2, T=3, N=3, K=1, H=64, dtype="bfloat16") -> dict:
    kv, angles, pages = (B, T, K, H), (B, T, H // 2), (4, K, 16, H)
    arrays = {
        "q": zeros(B, T, N, H, dtype=dtype), "k": zeros(*kv, dtype=dtype),
        "v": zeros(*kv, dtype=dtype), "cos": zeros(*angles, dtype="float32"),
        "sin": zeros(*angles, dtype="float32"), "k_pages": zeros(*pages, dtype=dtype),
        "v_pages": zeros(*pages, dtype=dtype), "page_table": zeros(B, 2, dtype="int32"),
        "start": zeros(B, dtype="int32"), "num_tokens": zeros(B, dtype="int32"),
    }  # fmt: skip
    return {name: jnp.asarray(array) for name, array in arrays.items()}


WRONG = {
    "rank": ({"q": zeros(2, 3, 64)}, "q must have 4 dimensions; got shape (2, 3, 64)"),
    "angle rank": ({"cos": zeros(3, 32)}, "cos must have 3 dimensions; got shape (3, 32)"),
    "start rank": ({"start": zeros(dtype="int32")}, "start must have 1 dimensions; got shape ()"),
    "no tokens": ({"q": zeros(2, 0, 3, 64)}, "q must not be empty; got shape (2, 0, 3, 64)"),
    "odd": ({"q": zeros(2, 3, 3, 63)}, "head_dim must be even, to be rotated in pairs; got H=63"),
    "v": ({"v": zeros(2, 3, 2, 64)}, "k and v must be [B, T, K, H] like q (2, 3, 3, 64)"),
    "tokens": ({"k": zeros(2, 4, 1, 64), "v": zeros(2, 4, 1, 64)}, "k and v must be [B, T, K, H]"),
    "cos": ({"cos": zeros(2, 3, 64)}, "must be [B, T, H/2] = (2, 3, 32); got (2, 3, 64)"),
    "pages": ({"k_pages": zeros(4, 2, 16, 64)}, "pages must be [P, 1, p, 64]; got (4, 2, 16, 64)"),
    "pools": ({"v_pages": zeros(4, 1, 8, 64)}, "pages must be [P, 1, p, 64]"),
    "table": ({"page_table": zeros(3, 2, dtype="int32")}, "page_table must have B=2 rows; got (3,"),
    "start": ({"start": zeros(3, dtype="int32")}, "start must have B=2 rows; got (3,)"),
    "counts": ({"num_tokens": zeros(1, dtype="int32")}, "num_tokens must have B=2 rows; got (1,)"),
    "name": ({"implementation": "cudnn"}, "must be among ['mosaic', 'xla']; got 'cudnn'"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.usefixtures("unchecked")
def test_shapes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rope_kv_write(**arguments() | changes)


@pytest.mark.parametrize(("changes", "message"), [
    ({"v": zeros(2, 3, 1, 64, dtype="float16")}, "one dtype; got bfloat16, float16, bfloat16"),
    ({"k_pages": zeros(4, 1, 16, 64, dtype="float32")}, "k, v and pages must have one dtype"),
    ({"page_table": zeros(2, 2, dtype="float32")}, "page_table must be integers; got float32"),
    ({"start": zeros(2, dtype="float32")}, "start must be integers; got float32"),
    ({"num_tokens": zeros(2, dtype="bool")}, "num_tokens must be integers; got bool"),
], ids=["v", "pages", "table", "start", "counts"])  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_types_that_do_not_fit(changes, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        rope_kv_write(**arguments() | changes)


@pytest.mark.parametrize(("changes", "argument", "nearest"), [
    ({"dtype": "float32"}, "dtypes float32 and float32", "bfloat16 or float16 for all"),
    ({"H": 32}, "head_dim 32", "64, 128, 256"),
    ({"N": 4}, "N + K = 5 heads at head_dim 64", "a multiple of 4 (2 at H = 128)"),
    ({"N": 300, "K": 4}, "300 heads", "at most 256"),
    ({"N": 4, "K": 300}, "300 heads", "at most 256"),
    ({"N": 256, "K": 256, "H": 256}, "N + 2·K = 768 heads at head_dim 256", "at most 454"),
], ids=["dtype", "head_dim", "division", "query heads", "KV heads", "shared memory"])  # fmt: skip
def test_the_kernel_names_what_it_lacks(h100, changes, argument, nearest):
    with pytest.raises(NotSupported) as error:
        rope_kv_write(**arguments(**changes), implementation="mosaic")
    assert (error.value.op, error.value.implementation) == ("rope_kv_write", "mosaic")
    assert (error.value.argument, error.value.nearest) == (argument, nearest)


def test_the_kernel_needs_hopper():
    with use_device(CPU), pytest.raises(NotSupported, match="device 'cpu'; supported: Hopper GPUs"):
        rope_kv_write(**arguments(), implementation="mosaic")


def test_several_that_cannot_serve(h100):
    with pytest.raises(ExceptionGroup) as error:
        rope_kv_write(**arguments(H=32), implementation=("mosaic", "mosaic"))
    assert [type(reason) for reason in error.value.exceptions] == [NotSupported] * 2


def test_the_default_is_the_kernel_where_it_can_serve():
    for device, H, expected in ((H100, 64, "mosaic"), (H100, 32, "xla"), (CPU, 64, "xla")):
        with use_device(device):
            jax.eval_shape(lambda H=H: rope_kv_write(**arguments(H=H)))
        assert choices()["rope_kv_write"].implementation == expected


def test_force_implementation(h100):
    with force_implementation("xla"):
        jax.eval_shape(lambda: rope_kv_write(**arguments()))
    assert choices()["rope_kv_write"].implementation == "xla"
