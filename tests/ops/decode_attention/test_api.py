"""What `decode_attention` refuses, and how it chooses."""

import collections
import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.pallas_kernels import plgpu
from jaxinfer.pallas_kernels.decode_attention.api import decode_attention
from jaxinfer.pallas_kernels.decode_attention.config import check_fits, heuristic_config
from jaxinfer.pallas_kernels.decode_attention.shape import Config
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
    "softcap": ({"logits_softcap": 0.0}, "logits_softcap must be positive and finite"),
    "inf softcap": ({"logits_softcap": float("inf")}, "in float32; got inf"),
    "nan softcap": ({"logits_softcap": float("nan")}, "in float32; got nan"),
    "huge softcap": ({"logits_softcap": 1e39}, "in float32; got 1e+39"),
    "tiny softcap": ({"logits_softcap": 1e-39}, "in float32; got 1e-39"),
    "softmax": ({"softmax": "fast"}, "softmax must be one of ('auto', 'online', 'unified')"),
    "phi": ({"phi": np.zeros(3)}, "phi must have one number per query head (4); got (3,)"),
    "phi list": ({"phi": [0.0, 1.0]}, "phi must have one number per query head (4); got (2,)"),
    "phi inf": ({"phi": np.full(4, np.inf)}, "phi must be finite"),
    "phi huge": ({"phi": np.array([1e39, 0, 0, 0])}, "phi must be finite in float32"),
    "phi online": ({"phi": np.zeros(4), "softmax": "online"}, "phi is for the unified softmax"),
    "scale": ({"scale": float("inf")}, "scale must be finite in float32; got inf"),
    "integer scale": ({"scale": 10**400}, "scale must be finite in float32; got 1000"),
    "huge scale": ({"scale": 1e39}, "scale must be finite in float32; got 1e+39"),
    "layout": ({"page_table": None, "kv_layout": "zz"}, "kv_layout must be one of"),
    "window": ({"local_window_size": -1}, "local_window_size must not be negative; got -1"),
    "left": ({"local_window_size": (-1, 0)}, "must not be negative; got (-1, 0)"),
    "right": ({"local_window_size": (4, -1)}, "must not be negative; got (4, -1)"),
    "one side": ({"local_window_size": (4,)},
                 "local_window_size must be an int or (left, right); got (4,)"),
    "three sides": ({"local_window_size": (4, 0, 0)}, "(left, right); got (4, 0, 0)"),
    "name": ({"implementation": "cuda"}, "must be among ['mosaic', 'xla']; got 'cuda'"),
    "no name": ({"implementation": 3}, "must be among ['mosaic', 'xla']; got 3"),
}  # fmt: skip


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
    ({"local_window_size": 2.5}, "local_window_size must be of integers; got 2.5"),
    ({"local_window_size": (3, None)}, "local_window_size must be of integers; got (3, None)"),
    ({"phi": ["a", "b"]}, "phi must be an array of real numbers; got list"),
    ({"phi": shape(4, dtype="complex64")}, "phi must be an array of real numbers; got complex64"),
    ({"query": [[0.0]]}, "query must be an array; got list"),
    ({"v_pages": None}, "v_pages must be an array; got None"),
    ({"page_table": [[0]]}, "page_table must be an array; got list"),
    ({"lengths": [5, 5]}, "lengths must be an array; got list"),
    ({"scale": "1"}, "scale must be a number, known when the call is traced; got str"),
    ({"logits_softcap": "5"}, "logits_softcap must be a number"),
    ({"scale": b"1"}, "scale must be a number, known when the call is traced; got bytes"),
    ({"config": 3}, "decode_attention.shape.Config; got int"),
], ids=str)  # fmt: skip
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


@pytest.mark.parametrize("window", [32, 2**31 - 1, 2**40, (2**31, 0)])
def test_a_window_that_hides_nothing_is_none(h100, window):
    call = functools.partial(decode_attention, **arguments(T=2), implementation="mosaic")
    wide = functools.partial(call, local_window_size=window)
    assert str(jax.make_jaxpr(wide)()) == str(jax.make_jaxpr(call)())
    plgpu.lower_for_cuda(wide, spec=h100)


@pytest.mark.usefixtures("unchecked")
def test_phi_may_be_any_sequence():
    """Also where it is a constant of a compiled function."""
    call = functools.partial(
        decode_attention, **arguments(), softmax="unified", implementation="xla"
    )
    same_bits(call(phi=[0.0, 1.0, 2.0, 3.0]), call())
    jax.eval_shape(lambda: call(phi=[0.0, 1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="phi must be finite"):
        jax.eval_shape(lambda: call(phi=[0.0, 1.0, 2.0, float("nan")]))


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
    ({"ctas_per_sm": 33}, "ctas_per_sm must be 1 to 32; got 33"),
    ({"ctas_per_sm": 0}, "ctas_per_sm must be 1 to 32; got 0"),
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
    config = heuristic_config(H100, rows=rows, head_dim=head_dim)
    check_fits(config, H100, rows=rows, head_dim=head_dim)
    ring = config.stages * 2 * config.block * head_dim * 2  # keys and values of 16 bits
    assert ring == (128 << 10 if config.block == 128 or head_dim == 256 else 64 << 10)
    assert (config.block == 128) == (rows == 8 and head_dim < 256)  # many rows take registers


def test_a_tiling_must_leave_registers(h100):
    config = Config(block=128, stages=2)
    with pytest.raises(ValueError, match=r"config must leave registers for 64 query rows of 256"):
        check_fits(config, h100, rows=64, head_dim=256)


def test_the_heuristic_says_when_nothing_fits():
    tiny = dataclasses.replace(H100, smem_bytes=48 * 1024)
    with pytest.raises(ValueError, match="no tiling fits 49152 bytes"):
        heuristic_config(tiny, rows=64, head_dim=256)


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


FAILED = (ValueError, jax.errors.JaxRuntimeError)  # in a compiled function JAX has the choice
OUT_OF_RANGE = {
    "long": ({"lengths": [5, 33]}, "lengths must be 0 … 32, the keys that a row has room for; "
                                   "got 33 in row 1"),
    "negative": ({"lengths": [-1, 5]}, "got -1 in row 0"),
    "page": ({"page_table": [[1, 9], [0, 4]], "lengths": [16, 17]},
             "page_table must name pages 0 … 3 where lengths reach; got 4 in row 1, entry 1"),
    "negative page": ({"page_table": [[-1, 0], [0, 0]]}, "got -1 in row 0, entry 0"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), OUT_OF_RANGE.values(), ids=OUT_OF_RANGE)
def test_in_debug_mode_values_out_of_range_are_refused(monkeypatch, changes, message):
    monkeypatch.setenv("JAXINFER_DEBUG", "1")
    changed: Any = {name: jnp.array(values, jnp.int32) for name, values in changes.items()}
    arrays = arguments(dtype="float32") | changed
    with pytest.raises(ValueError, match=re.escape(message)):
        decode_attention(**arrays)
    traced = jax.jit(lambda arrays: decode_attention(**arrays))
    with pytest.raises(FAILED, match=re.escape(message)):
        jax.block_until_ready(traced(arrays))


def test_in_debug_mode_contiguous_keys_end_the_lengths(monkeypatch):
    monkeypatch.setenv("JAXINFER_DEBUG", "1")
    keys = normal(1, (2, 7, 2, 8), "float32")
    call = functools.partial(decode_attention, normal(0, (2, 1, 4, 8), "float32"), keys, keys, None)
    call(jnp.array([0, 7]))
    with pytest.raises(ValueError, match=r"lengths must be 0 … 7, .*; got 8 in row 1"):
        call(jnp.array([0, 8]))


def test_in_debug_mode_a_single_page_is_checked_too(monkeypatch):
    """XLA knows which page it must be, and needs no table."""
    monkeypatch.setenv("JAXINFER_DEBUG", "1")
    pages, query = jnp.ones((1, 1, 16, 8)), jnp.ones((1, 1, 2, 8))
    call = jax.jit(lambda table, lengths: decode_attention(query, pages, pages, table, lengths))
    for page, length, message in ((0, 17, "lengths must be"), (9, 5, "page_table must name")):
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            jax.block_until_ready(call(jnp.array([[page]]), jnp.array([length])))
    assert jnp.isfinite(call(jnp.array([[0]]), jnp.array([16]))).all()


def test_debug_mode_changes_no_result(monkeypatch):
    """Entries that lengths do not reach may hold anything."""
    arrays = arguments()
    arrays.update(page_table=jnp.array([[3, 99], [-1, 7]]), lengths=jnp.array([16, 0]))

    def results() -> tuple[jax.Array, ...]:
        of = lambda table: decode_attention(**arrays | {"page_table": table})
        given = arrays["page_table"]
        return of(given), jax.jit(of)(given), jax.vmap(of)(given[None])[0]

    monkeypatch.delenv("JAXINFER_DEBUG", raising=False)
    want = results()
    monkeypatch.setenv("JAXINFER_DEBUG", "1")
    for got, expected in zip(results(), want, strict=True):
        same_bits(got, expected)


def test_the_kernel_runs_behind_the_checks(monkeypatch, interpreter):
    monkeypatch.setenv("JAXINFER_DEBUG", "1")
    call = jax.jit(lambda arrays: decode_attention(**arrays, implementation="mosaic"))
    with pytest.raises(FAILED, match="lengths must be 0 … 32"):
        interpreter.run(call, arguments() | {"lengths": jnp.array([5, 40])})
    interpreter.run(call, arguments())


def test_out_of_debug_mode_nothing_is_checked(monkeypatch):
    def lowered() -> str:
        return jax.jit(lambda arrays: decode_attention(**arrays)).lower(arguments()).as_text()

    monkeypatch.delenv("JAXINFER_DEBUG", raising=False)
    plain = lowered()
    arrays = arguments()
    arrays["lengths"] = jnp.array([-1, 99])
    decode_attention(**arrays)
    monkeypatch.setenv("JAXINFER_DEBUG", "1")
    assert "callback" in lowered()
    monkeypatch.setenv("JAXINFER_DEBUG", "0")
    assert lowered() == plain
    assert "callback" not in plain


@pytest.mark.usefixtures("unchecked")
def test_a_complex_phi_is_refused_while_traced():
    def call(phi):
        return decode_attention(**arguments(), phi=phi)

    with pytest.raises(TypeError, match="phi must be an array of real numbers; got complex64"):
        jax.eval_shape(call, shape(4, dtype="complex64"))


@pytest.mark.usefixtures("unchecked")
def test_numbers_of_jax_are_numbers(h100):
    """The kernel's options are static, which arrays are not."""
    numbers = {"scale": jnp.float32(0.25), "logits_softcap": np.float64(30)}
    call = functools.partial(decode_attention, **numbers, implementation="mosaic")
    assert "mosaic_gpu" in plgpu.lower_for_cuda(lambda kw: call(**kw), arguments(), spec=h100)


def test_several_names_in_any_collection():
    names = collections.deque(["mosaic", "xla"])
    same_bits(
        decode_attention(**arguments(), implementation=names), decode_attention(**arguments())
    )


def test_fallbacks_are_int32_whatever_the_precision(h100):
    def call(arrays):
        return decode_attention(
            **arrays, softmax="unified", return_fallbacks=True, implementation="mosaic"
        )

    given = arguments()
    with jax.enable_x64(True), use_device(h100):
        assert jax.eval_shape(call, given)[1].dtype == jnp.int32
