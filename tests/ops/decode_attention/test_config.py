"""Which implementation and tiling `decode_attention` takes, and which tilings compete in tuning."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.pallas_kernels import tuning
from jaxinfer.pallas_kernels.decode_attention import api
from jaxinfer.pallas_kernels.decode_attention import config as configs
from jaxinfer.pallas_kernels.decode_attention.api import decode_attention
from jaxinfer.pallas_kernels.decode_attention.layout import KVLayout
from jaxinfer.pallas_kernels.decode_attention.shape import Config, tile_rows
from jaxinfer.pallas_kernels.decode_attention.specs import SPECS, DecodeSpec
from jaxinfer.pallas_kernels.device import CPU, H100, use_device
from jaxinfer.pallas_kernels.dispatch import choices, force_implementation
from tests.ops.cases import cases

LLAMA: dict[str, Any] = {"B": 8, "S": 8192, "T": 1, "N": 32, "K": 8, "H": 128, "page_size": 64}
TILING = {"block": 64, "stages": 3, "ctas_per_sm": 1}
XLA = {"implementation": "xla", "config": TILING, "us": {"xla": 10.0, "mosaic": 11.0}}
MOSAIC = XLA | {"implementation": "mosaic", "us": {"xla": 10.0, "mosaic": 9.0}}


@pytest.fixture
def measured(monkeypatch):
    """Let one entry be what was measured, for every call; gives the keys that are looked up."""

    def install(entry):
        asked = []

        def lookup(op, device, key):
            asked.append((op, device.key, key))
            return [] if entry is None else [("nvidia/decode_attention.json", entry)]

        monkeypatch.setattr(tuning, "lookup", lookup)
        monkeypatch.setattr(tuning, "_ignored", set())
        return asked

    return install


def trace(B=2, T=1, M=4, *, dtype="bfloat16", layout: KVLayout = "PKpH", page_size=64, **options):
    """Trace a call of 4 query and 2 KV heads; what was taken, and the kernel's tiling."""
    tilings = []
    real = api.decode_attention_mosaic

    def kernel(*arrays, config, **others):
        tilings.append(config)
        return real(*arrays, config=config, **others)

    sizes = {"P": 8, "K": 2, "p": page_size}
    pages = jax.ShapeDtypeStruct((*(sizes[axis] for axis in layout[:3]), 64), dtype)
    arrays = (
        jax.ShapeDtypeStruct((B, T, 4, 64), dtype), pages, pages,
        jax.ShapeDtypeStruct((B, M), jnp.int32), jax.ShapeDtypeStruct((B,), jnp.int32),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "decode_attention_mosaic", kernel)
        jax.eval_shape(lambda *a: decode_attention(*a, kv_layout=layout, **options), *arrays)
    return choices()["decode_attention"].implementation, *tilings


@pytest.mark.parametrize(("sizes", "key"), [
    ({}, "b8 s8192 n32 k8 h128 p64"),
    ({"B": 1, "S": 1}, "b1 s1024 n32 k8 h128 p64"),
    ({"B": 2, "S": 1024}, "b8 s1024 n32 k8 h128 p64"),
    ({"B": 9, "S": 1025}, "b64 s8192 n32 k8 h128 p64"),
    ({"B": 64, "S": 8193}, "b64 s32768 n32 k8 h128 p64"),
    ({"S": 131_072, "page_size": 16}, "b8 s131072 n32 k8 h128 p16"),
    ({"left_window": 511}, "b8 s8192 n32 k8 h128 p64 w511"),
    ({"left_window": 8190}, "b8 s8192 n32 k8 h128 p64 w8190"),
    ({"left_window": 8191}, "b8 s8192 n32 k8 h128 p64"),  # hides nothing
], ids=str)  # fmt: skip
def test_keys_and_buckets(measured, sizes, key):
    asked = measured(None)
    configs.choose_config(H100, **LLAMA | sizes)
    assert asked == [("decode_attention", "nvidia_h100_80gb_hbm3", key)]


@pytest.mark.parametrize(
    "sizes", [{"B": 65}, {"S": 131_073}, {"T": 2}, {"as_measured": False}], ids=str
)
def test_beyond_what_is_measured_the_heuristic_decides(measured, sizes):
    asked = measured(XLA)
    choice = configs.choose_config(H100, **LLAMA | sizes)
    assert (choice.order, choice.config) == (("mosaic", "xla"), None)
    assert asked == []


def test_a_spec_has_the_key_of_its_call(measured):
    asked = measured(None)
    spec = DecodeSpec(model="x", B=8, S=1000, N=4, K=2, H=64, page_size=32, local_window_size=20)
    configs.choose_config(H100, B=8, S=1000, T=1, N=4, K=2, H=64, page_size=32, left_window=20)
    assert asked[0][2] == spec.tuning_key == "b8 s1024 n4 k2 h64 p32 w20"


def test_the_call_asks_for_what_it_is(measured, h100):
    """Capacity is the width of the page table; lengths are not known."""
    asked = measured(None)
    trace(B=3, M=20, page_size=64, local_window_size=(100, 0))
    assert asked == [("decode_attention", h100.key, "b8 s8192 n4 k2 h64 p64 w100")]


def test_what_was_measured_is_taken(measured, h100):
    measured(MOSAIC)
    assert trace() == ("mosaic", Config(**TILING))
    measured(XLA)
    assert trace() == ("xla",)
    measured(None)
    assert trace() == ("mosaic", Config(block=128, stages=4))


def test_what_was_measured_slower_is_taken_only_by_name(measured, h100):
    measured(XLA)
    assert trace() == ("xla",)
    assert trace(implementation="mosaic") == ("mosaic", Config(**TILING))
    assert trace(implementation=("mosaic", "xla"))[0] == "mosaic"
    with force_implementation("mosaic", op="decode_attention"):
        assert trace()[0] == "mosaic"
    measured(MOSAIC)
    assert trace(implementation="xla") == ("xla",)
    with force_implementation("xla"):
        assert trace() == ("xla",)


def test_a_tiling_of_the_caller_wins(measured, h100):
    measured(MOSAIC)
    mine = Config(block=128, stages=2)
    assert trace(config=mine) == ("mosaic", mine)


@pytest.mark.parametrize("options", [
    {"T": 2}, {"layout": "PpKH"}, {"softmax": "unified"}, {"B": 65},
], ids=str)  # fmt: skip
def test_other_calls_than_those_measured_take_the_heuristic(measured, h100, options):
    asked = measured(XLA)
    assert trace(**options) == ("mosaic", Config(block=128, stages=4))
    assert asked == []


def test_where_the_kernel_cannot_serve_xla_does(measured, h100):
    measured(MOSAIC)
    assert trace(dtype="float32") == ("xla",)


def test_elsewhere_nothing_is_looked_up(measured):
    asked = measured(MOSAIC)
    with use_device(CPU):
        assert trace() == ("xla",)
    assert "device 'cpu'" in choices()["decode_attention"].passed_over[0]
    assert asked == []


DAMAGED = {
    "empty": {},
    "another implementation": {"implementation": "triton"},
    "unknown field": {"implementation": "mosaic", "config": {"block_n": 64}},
    "impossible": {"implementation": "xla", "config": {"block": 96}},
    "a fraction": {"implementation": "mosaic", "config": {"stages": 2.5}},
    "a list": {"implementation": "mosaic", "config": [64, 2]},
    "too large": {"implementation": "mosaic", "config": {"block": 128, "stages": 4}},
    "times as text": {"implementation": "xla", "us": {"xla": "fast", "mosaic": 2.0}},
}


@pytest.mark.parametrize("entry", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_measurement_leaves_the_heuristic(measured, caplog, entry):
    measured(entry)
    for _ in range(2):
        choice = configs.choose_config(H100, **LLAMA)
        assert (choice.order, choice.config) == (("mosaic", "xla"), None)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "entry 'b8 s8192 n32 k8 h128 p64'" in record.getMessage()
    assert "nvidia/decode_attention.json" in record.getMessage()


@pytest.mark.parametrize("spec", cases([spec for spec in SPECS if spec.T == 1]))
def test_the_heuristics_tiling_competes(spec):
    sizes = {"N": spec.N, "K": spec.K, "H": spec.H, "page_size": spec.page_size}
    found = configs.candidates(H100, **sizes)
    rows = tile_rows(spec.N // spec.K)
    fit = functools.partial(configs.check_fits, device=H100, rows=rows, head_dim=spec.H)
    heuristic = configs.heuristic_config(H100, rows=rows, head_dim=spec.H)
    assert found[0] == heuristic
    assert len(set(found)) == len(found)
    for config in found:
        fit(config)
    for config in set(configs.GRID) - set(found):
        with pytest.raises(ValueError, match=r"config must (fit 232448 bytes|leave registers)"):
            fit(config)


@pytest.mark.parametrize(("G", "competes"), [(8, True), (32, True), (64, False)])
def test_wide_blocks_are_for_few_query_rows(G, competes):
    """Of more, logits and sums would not fit the registers."""
    found = configs.candidates(H100, N=G, K=1, H=64, page_size=64)
    assert (Config(block=256, stages=2) in found) == competes


@pytest.mark.parametrize("sizes", [
    {"H": 80}, {"page_size": 48}, {"N": 65, "K": 1},
], ids=str)  # fmt: skip
def test_no_tilings_for_what_the_kernel_lacks(sizes):
    given = {"N": 4, "K": 2, "H": 64, "page_size": 64}
    assert configs.candidates(H100, **given | sizes) == []
