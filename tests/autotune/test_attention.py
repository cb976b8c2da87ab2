"""Decode attention in tuning: which calls of a model, and from their times to what is chosen."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.autotune import decode_attention as adapter
from jaxinfer.autotune import report
from jaxinfer.autotune import tune as module
from jaxinfer.autotune.ops import OPS
from jaxinfer.autotune.tune import Plan, Tuned, tune
from jaxinfer.models.config import DecoderConfig
from jaxinfer.op_choices import op_choices
from jaxinfer.pallas_kernels import tuning
from jaxinfer.pallas_kernels.decision import decide
from jaxinfer.pallas_kernels.decode_attention.config import BATCHES, CAPACITIES, choose_config
from jaxinfer.pallas_kernels.decode_attention.shape import Config
from jaxinfer.pallas_kernels.decode_attention.specs import SPECS, DecodeSpec, make_inputs
from jaxinfer.pallas_kernels.device import H100
from tests.autotune.fakes import Clock
from tests.metrics import assert_close
from tests.ops.cases import cases, inputs
from tests.ops.decode_attention.calls import call_reference

OP = OPS["decode_attention"]
GEMMA = DecoderConfig.tiny(
    num_layers=4, num_heads=4, num_kv_heads=1, head_dim=256, attention_softcap=50.0,
    sliding_window=2048, local_layers=(True, True, False, True),
)  # fmt: skip
CONFIGS = {"llama": DecoderConfig.llama3_8b(), "smollm2": DecoderConfig.smollm2_135m(),
           "gemma": GEMMA}  # fmt: skip
LLAMA = OP.specs(CONFIGS["llama"], model="llama-3-8b", dtype="bfloat16")


def choice(spec):
    return choose_config(
        H100, B=spec.B, S=spec.S, T=1, N=spec.N, K=spec.K, H=spec.H, page_size=spec.page_size,
        left_window=spec.local_window_size,
    )  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_they_are_what_the_model_looks_up(monkeypatch, config):
    """`op_choices` decodes 8 rows that have room for 4096 tokens."""
    asked = set()
    monkeypatch.setattr(tuning, "lookup", lambda op, device, key: asked.add((op, key)) or [])
    op_choices(config, H100, jnp.bfloat16)
    specs = OP.specs(config, model="model", dtype="bfloat16")
    keys = {spec.tuning_key for spec in specs if (spec.B, spec.S) == (8, 8192)}
    assert keys == {key for op, key in asked if op == "decode_attention"}


def test_every_bucket_of_every_kind_of_layer():
    assert [(spec.S, spec.B) for spec in LLAMA] == [(S, B) for S in CAPACITIES for B in BATCHES]
    assert {(spec.N, spec.K, spec.H, spec.T, spec.lengths) for spec in LLAMA} == {
        (32, 8, 128, 1, "full")
    }
    specs = OP.specs(GEMMA, model="gemma", dtype="float16")
    assert {(spec.dtype, spec.logits_softcap) for spec in specs} == {("float16", 50.0)}
    windows = {S: {spec.local_window_size for spec in specs if spec.S == S} for S in CAPACITIES}
    both = {None, 2047}
    assert windows == {1024: {None}, 8192: both, 32_768: both, 131_072: both}
    assert len(specs) == len({spec.tuning_key for spec in specs}) == 21


def test_what_takes_too_much_memory_is_skipped():
    plan = Plan.of(OP, LLAMA, H100)
    skipped = {(spec.B, spec.S): why for spec, why in plan.skipped.items()}
    assert skipped == {(64, 131_072): "32 GiB of keys and values"}
    assert all(spec not in plan.tilings for spec in plan.skipped)
    assert plan.refused == []
    assert len(plan.tilings) == 11
    assert plan.seconds > 0


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_heuristics_tiling_competes(config):
    for spec in OP.specs(config, model="model", dtype="bfloat16"):
        assert OP.heuristic(H100, spec) in OP.candidates(H100, spec)


def test_what_the_kernel_lacks_is_not_measured():
    specs = OP.specs(DecoderConfig.tiny(head_dim=32), model="tiny", dtype="bfloat16")
    plan = Plan.of(OP, specs, H100)
    assert plan.refused == specs
    assert plan.tilings == plan.skipped == {}


def test_what_was_tuned_is_what_is_chosen(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXINFER_TUNING", str(tmp_path))
    clock = Clock({(1, 1024): 1.2, (8, 1024): 0.995, (8, 8192): 0.5})
    monkeypatch.setattr(module, "measure", clock)
    plan = Plan.of(OP, LLAMA, H100)
    found = list(tune(plan, H100, folder=tmp_path, command="x", progress=lambda *_: None))
    assert (tmp_path / H100.key / "decode_attention.json").is_file()
    for one in found:
        got = choice(one.spec)
        slow = (one.spec.B, one.spec.S) in ((1, 1024), (8, 1024))
        assert got.order == (("xla",) if slow else ("mosaic", "xla"))
        assert got.config == Config(**one.entry["config"])
        assert one.heuristic_us == one.kernel_us  # the first tiling is the clock's fastest
    # Neighbours get what was measured at their bucket.
    near = dataclasses.replace(LLAMA[1], B=5, S=640)
    assert choice(near).order == ("xla",)
    assert choice(dataclasses.replace(near, S=1088)).order == ("mosaic", "xla")
    # What was skipped is the heuristic's.
    (skipped,) = plan.skipped
    assert choice(skipped).config is None


@pytest.mark.parametrize("spec", cases([spec for spec in SPECS if spec.tag == "ci"]))
def test_the_gate_compares_with_what_the_op_computes(spec):
    arrays = inputs(make_inputs, spec, 3)
    got = jax.jit(OP.reference(spec))(*arrays)
    want, _ = call_reference(spec, arrays)
    assert got.dtype == jnp.float32
    # Both in float32, from the same 16-bit numbers: they differ by the order of sums.
    assert_close(got, want, rms=1e-5, max_abs=1e-4, label="out")


def test_memory_is_counted_by_dtype():
    of = DecodeSpec(model="x", B=64, S=32_768, N=32, K=8, H=128)
    assert OP.too_large(of) == ""
    assert OP.too_large(dataclasses.replace(of, K=9)) == "9 GiB of keys and values"
    assert 2 * of.B * of.S * of.K * of.H * 2 == adapter.MOST_BYTES


def tuned(B, S, factor, heuristic_us=100.0, **options):
    spec = DecodeSpec(model="x", B=B, S=S, N=32, K=8, H=128, **options)
    entry = decide(100.0, {Config(block=128, stages=2): 100.0 * factor})
    return Tuned(spec=spec, entry=entry, heuristic_us=heuristic_us)


def test_gains_over_static_choices():
    some = [tuned(1, 1024, 0.5, 60.0), tuned(8, 8192, 2.0, 200.0, local_window_size=511)]
    lines = [line.split() for line in report.calls(some)]
    assert lines[0][:4] == ["B", "S", "w", "chosen"]
    assert lines[1] == [
        "1", "1024", "kernel", "128,", "2", "deep", "50.0", "100.0", "50.0", "100.0", "%",
        "0.0", "%", "20.0", "%",
    ]  # fmt: skip
    assert lines[2] == [
        "8", "8192", "511", "XLA", "100.0", "100.0", "200.0", "0.0", "%", "100.0", "%",
        "100.0", "%",
    ]  # fmt: skip


@pytest.mark.parametrize(("slow", "words"), [
    ((), "the kernel for all that was measured"),
    ((0, 1), "XLA for all that was measured"),
    ((1,), "XLA for b8 s8192 n32 k8 h128 p64; else the kernel"),
], ids=str)  # fmt: skip
def test_where_xla_was_chosen(slow, words):
    sizes = [(1, 1024), (8, 8192)]
    some = [tuned(*size, 2.0 if i in slow else 0.5) for i, size in enumerate(sizes)]
    assert report.where_xla(some) == [words]
