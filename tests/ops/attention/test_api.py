"""What `attention` refuses, and how it chooses."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.pallas_kernels.attention.api import attention
from jaxinfer.pallas_kernels.device import CPU, H100, use_device
from jaxinfer.pallas_kernels.dispatch import NotSupported, choices, force_implementation
from tests.metrics import assert_dtype_close
from tests.ops.cases import normal, same_bits


def zeros(*sizes, dtype="float32"):
    return np.zeros(sizes, dtype)


def arguments(T=3, S=3, N=4, K=2, H=8, B=2) -> dict:
    return {
        "query": normal(0, (B, T, N, H)), "key": normal(1, (B, S, K, H)),
        "value": normal(2, (B, S, K, H)),
    }  # fmt: skip


PAGES = {"key": zeros(5, 2, 16, 8), "value": zeros(5, 2, 16, 8)}
WRONG = {
    "rank": ({"query": zeros(3, 4, 8)}, "query must have 4 dimensions; got shape (3, 4, 8)"),
    "empty": ({"query": zeros(2, 0, 4, 8)}, "query must not be empty; got shape (2, 0, 4, 8)"),
    "no keys": ({"key": zeros(2, 0, 2, 8)}, "key must not be empty; got shape (2, 0, 2, 8)"),
    "value": ({"value": zeros(2, 4, 2, 8)}, "one shape; got (2, 3, 2, 8) and (2, 4, 2, 8)"),
    "head_dim": ({"query": zeros(2, 3, 4, 16)}, "head_dim of query and key must agree; got 16"),
    "batch": ({"query": zeros(1, 3, 4, 8)}, "must have one batch size; got 1 and 2"),
    "heads": ({"query": zeros(2, 3, 3, 8)}, "multiple of KV heads; got N=3 and K=2"),
    "page heads": (PAGES | {"query": zeros(2, 3, 3, 8), "page_table": zeros(2, 1, dtype="int32")},
                   "multiple of KV heads; got N=3 and K=2"),
    "table rank": (PAGES | {"page_table": zeros(2, dtype="int32")}, "page_table must be [B, M]"),
    "table rows": (PAGES | {"page_table": zeros(3, 1, dtype="int32")}, "with B=2; got (3, 1)"),
    "no pages": (PAGES | {"page_table": zeros(2, 0, dtype="int32")}, "at least one page per row"),
    "offset": ({"q_offset": zeros(3, dtype="int32")}, "q_offset must have shape [B] with B=2"),
    "queries": ({"query_seq_lengths": zeros(1, dtype="int32")}, "query_seq_lengths must have"),
    "keys": ({"key_value_seq_lengths": zeros(2, 1, dtype="int32")}, "must have shape [B] with B=2"),
    "softcap": ({"logits_softcap": -1.0}, "logits_softcap must be positive and finite"),
    "nan softcap": ({"logits_softcap": float("nan")}, "in float32; got nan"),
    "inf softcap": ({"logits_softcap": float("inf")}, "in float32; got inf"),
    "scale": ({"scale": float("nan")}, "scale must be finite in float32; got nan"),
    "window": ({"local_window_size": -2}, "local_window_size must not be negative; got -2"),
    "right": ({"local_window_size": (1, -2)}, "must not be negative; got (1, -2)"),
    "one side": ({"local_window_size": (4,)},
                 "local_window_size must be an int or (left, right); got (4,)"),
    "three sides": ({"local_window_size": (4, 0, 0)}, "(left, right); got (4, 0, 0)"),
    "name": ({"implementation": "triton"}, "among ['cudnn', 'flash_attn3', 'tokamax', 'xla']"),
    "one of the names": ({"implementation": ("xla", "x")}, "got ('xla', 'x')"),
    "no name": ({"implementation": ()}, "must be among"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.usefixtures("unchecked")
def test_values_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        attention(**arguments() | changes)


@pytest.mark.parametrize(("changes", "message"), [
    ({"query": zeros(2, 3, 4, 8, dtype="float16")}, "one dtype; got float16, float32, float32"),
    ({"query": zeros(2, 3, 4, 8, dtype="int32"), "key": zeros(2, 3, 2, 8, dtype="int32"),
      "value": zeros(2, 3, 2, 8, dtype="int32")}, "float32, bfloat16 or float16; got int32"),
    (PAGES | {"page_table": zeros(2, 1)}, "page_table must be integers; got float32"),
    ({"q_offset": zeros(2)}, "q_offset must be integers; got float32"),
    ({"q_offset": [0, 0]}, "q_offset must be an array; got list"),
    ({"key": None}, "key must be an array; got None"),
    ({"query_seq_lengths": zeros(2)}, "query_seq_lengths must be integers; got float32"),
    ({"key_value_seq_lengths": zeros(2)}, "key_value_seq_lengths must be integers; got float32"),
    ({"local_window_size": 2.5}, "local_window_size must be of integers; got 2.5"),
    ({"local_window_size": ("a", 0)}, "local_window_size must be of integers; got ('a', 0)"),
], ids=str)  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_types_that_do_not_fit(changes, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        attention(**arguments() | changes)


def test_an_implementation_asked_for_by_name_says_why_not():
    with use_device(CPU), pytest.raises(NotSupported) as error:
        attention(**arguments(), implementation="cudnn")
    message = "attention[cudnn] does not support device 'cpu'; supported: NVIDIA GPUs"
    assert str(error.value) == message


def test_several_that_cannot_serve_all_say_why_not():
    with use_device(CPU), pytest.raises(ExceptionGroup) as error:
        attention(**arguments(), implementation=("cudnn", "flash_attn3", "tokamax"))
    reasons = error.value.exceptions
    assert [str(reason).split("]")[0] for reason in reasons] == [
        "attention[cudnn", "attention[flash_attn3", "attention[tokamax",
    ]  # fmt: skip


def test_a_sequence_is_tried_in_order():
    with use_device(CPU):
        got = attention(**arguments(), implementation=["cudnn", "xla"])
    same_bits(got, attention(**arguments(), implementation="xla"))


def test_the_default_tries_what_the_device_prefers():
    with use_device(CPU):
        attention(**arguments())
    assert choices()["attention"].implementation == "xla"
    assert choices()["attention"].passed_over == ()
    with use_device(H100):
        attention(**arguments(H=128))  # float32: only xla serves it
    assert choices()["attention"].implementation == "xla"
    names = [reason.split("]")[0] for reason in choices()["attention"].passed_over]
    assert names == ["attention[flash_attn3", "attention[cudnn"]


def test_force_implementation():
    with use_device(H100), force_implementation("xla"):
        attention(**arguments())
    assert choices()["attention"].passed_over == ()


def test_an_int_window_stands_for_both_sides():
    call = functools.partial(attention, **arguments(T=6, S=6))
    same_bits(call(local_window_size=2), call(local_window_size=(2, 2)))
    causal = functools.partial(call, is_causal=True)
    same_bits(causal(local_window_size=2), causal(local_window_size=(2, 0)))
    same_bits(causal(local_window_size=2), causal(local_window_size=(2, 5)))
    assert not jnp.array_equal(call(local_window_size=(2, 0)), call(local_window_size=2))


@pytest.mark.parametrize("window", [2**30, 2**31 - 1, (2**40, 2**40)])
def test_a_window_wider_than_int32_hides_nothing(window):
    call = functools.partial(attention, **arguments(T=6, S=6))
    same_bits(call(local_window_size=window), call())
    offset = functools.partial(call, is_causal=True, q_offset=jnp.array([-3, 4]))
    same_bits(offset(local_window_size=window), offset())


def test_an_int_offset_stands_for_all_rows():
    call = functools.partial(attention, **arguments(T=2, S=6), is_causal=True)
    same_bits(call(q_offset=3), call(q_offset=jnp.array([3, 3])))
    same_bits(call(q_offset=0), call())
    assert not jnp.array_equal(call(q_offset=3), call())


def test_lengths_may_be_of_any_integer_type():
    call = functools.partial(attention, **arguments(), is_causal=True)
    want = call(q_offset=jnp.array([0, 1]), key_value_seq_lengths=jnp.array([3, 1]))
    narrow = {
        "q_offset": jnp.array([0, 1], "int8"),
        "key_value_seq_lengths": jnp.array([3, 1], "int16"),
    }
    same_bits(call(**narrow), want)


def test_scale_defaults_to_the_head_dimension():
    call = functools.partial(attention, **arguments())
    assert_dtype_close(call(scale=8**-0.5), call(), "float32")
    assert not jnp.array_equal(call(scale=1.0), call())


def test_without_residual_only_the_output_comes_back():
    call = functools.partial(attention, **arguments())
    same_bits(call(), call(return_residual=True)[0])


def paged(table, lengths=None) -> dict:
    """Arguments with 5 pages of 16 tokens."""
    pages = normal(1, (5, 2, 16, 8))
    arrays = {"query": normal(0, (2, 3, 4, 8)), "key": pages, "value": pages,
              "page_table": jnp.array(table, jnp.int32)}  # fmt: skip
    return arrays | ({} if lengths is None else {"key_value_seq_lengths": jnp.array(lengths)})


OUT_OF_RANGE = {
    "long": (paged([[0, 1], [2, 3]], [5, 33]), "key_value_seq_lengths must be 0 … 32, the keys "
             "that a row has room for; got 33 in row 1"),
    "negative": (paged([[0, 1], [2, 3]], [-7, 5]), "got -7 in row 0"),
    "page": (paged([[0, 9], [2, 5]], [16, 17]), "page_table must name pages 0 … 4 where "
             "key_value_seq_lengths reach; got 5 in row 1, entry 1"),
    "every page": (paged([[0, 1], [2, -1]]), "got -1 in row 1, entry 1"),
}  # fmt: skip


@pytest.mark.parametrize(("arrays", "message"), OUT_OF_RANGE.values(), ids=OUT_OF_RANGE)
def test_in_debug_mode_values_out_of_range_are_refused(monkeypatch, arrays, message):
    monkeypatch.setenv("JAXINFER_DEBUG", "1")
    with pytest.raises(ValueError, match=re.escape(message)):
        attention(**arrays)
    traced = jax.jit(lambda arrays: attention(**arrays))
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=re.escape(message)):
        jax.block_until_ready(traced(arrays))


def test_debug_mode_changes_no_result(monkeypatch):
    """Entries that lengths do not reach may hold anything."""
    arrays = paged([[4, 99], [-1, 7]], [16, 0])
    monkeypatch.delenv("JAXINFER_DEBUG", raising=False)
    plain = jax.jit(lambda arrays: attention(**arrays))
    assert "callback" not in plain.lower(arrays).as_text()
    want = attention(**arrays), plain(arrays)
    monkeypatch.setenv("JAXINFER_DEBUG", "1")
    checked = jax.jit(lambda arrays: attention(**arrays))
    assert "callback" in checked.lower(arrays).as_text()
    same_bits(attention(**arrays), want[0])
    same_bits(checked(arrays), want[1])
