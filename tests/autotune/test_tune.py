"""From measured times to what ops choose, and to what is shown."""

import pytest

from jaxinfer.autotune import report
from jaxinfer.autotune import tune as module
from jaxinfer.autotune.ops import OPS
from jaxinfer.autotune.products import products
from jaxinfer.autotune.tune import Plan, Tuned, tune
from jaxinfer.models.config import DecoderConfig
from jaxinfer.pallas_kernels.decision import decide
from jaxinfer.pallas_kernels.device import H100
from jaxinfer.pallas_kernels.matmul.config import BUCKETS, choose_config
from jaxinfer.pallas_kernels.matmul.shape import Config
from jaxinfer.pallas_kernels.matmul.specs import MatmulSpec
from tests.autotune.fakes import Clock

SPECS = products(DecoderConfig.llama3_8b(), name="llama-3-8b", dtype="bfloat16")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Tune products with a clock; the user's data are in a folder of the test."""
    monkeypatch.setenv("JAXINFER_TUNING", str(tmp_path))

    def run(clock, specs=SPECS, progress=lambda *_: None):
        monkeypatch.setattr(module, "measure", clock)
        plan = Plan.of(OPS["matmul"], specs, H100)
        return tune(plan, H100, folder=tmp_path, command="jaxinfer tune x", progress=progress)

    return run


def choice(spec, M=None):
    return choose_config(
        H100, M=M or spec.M, K=spec.K, N=spec.N, gated=spec.gate is not None,
        transposed=spec.transposed, cast=spec.cast,
    )  # fmt: skip


def test_what_was_tuned_is_what_is_chosen(run):
    clock = Clock({1: 0.8, 8: 0.995, 16: 1.2, 32: 0.7, 64: 0.98, 128: 2})
    tuned = list(run(clock))
    assert [one.spec for one in tuned] == SPECS
    for one in tuned:
        found = choice(one.spec)
        assert found.order == (("mosaic", "xla") if one.spec.M in (1, 32, 64) else ("xla",))
        assert found.order[0] == one.entry["implementation"]
        assert found.config == Config(**one.entry["config"])


def test_neighbours_get_what_was_measured_at_their_bucket(run):
    list(run(Clock({1: 2, 8: 0.5, 16: 2})))
    assert [choice(SPECS[0], M).order[0] for M in (1, 2, 7, 8, 9, 16)] == [
        "xla", "mosaic", "mosaic", "mosaic", "xla", "xla",
    ]  # fmt: skip


def test_each_is_kept_before_the_next_is_measured(run):
    found = run(Clock({1: 0.5}, fail_at=2))
    next(found)
    next(found)
    with pytest.raises(KeyboardInterrupt):
        next(found)
    assert [choice(spec).order[0] for spec in SPECS[:2]] == ["mosaic", "mosaic"]


def test_progress(run):
    told = []
    list(run(Clock(), SPECS[:2], lambda *what: told.append(what)))
    first, second = (spec.name for spec in SPECS[:2])
    assert told == [(first, 0, 2), (first, 1, 2), (second, 1, 2), (second, 2, 2)]


def test_products_that_are_alike_are_measured_once(run):
    clock = Clock()
    alike = [MatmulSpec(model="x", part=part, M=1, K=128, N=128) for part in ("o", "down")]
    assert [one.spec.part for one in run(clock, alike)] == ["o", "down"]
    assert len(clock.asked) == 1


def test_what_the_kernel_lacks_is_not_measured():
    odd = MatmulSpec(model="x", M=8, K=100, N=128)
    plan = Plan.of(OPS["matmul"], [odd, SPECS[0]], H100)
    assert plan.refused == [odd]
    assert list(plan.tilings) == [SPECS[0]]
    assert plan.seconds > 0


def tuned(factors, part="qkv"):
    return [
        Tuned(
            spec=MatmulSpec(model="x", part=part, M=M, K=4096, N=4096),
            entry=decide(100.0, {Config(): 100.0 * factor}),
            heuristic_us=100.0,
        )
        for M, factor in factors.items()
    ]


@pytest.mark.parametrize(("fast", "ranges", "words"), [
    ((), [], "XLA for all M"),
    (BUCKETS, [(1, 128)], "flat kernel for M = 1 to 128, else XLA (M1 = 1, M2 = 129)"),
    ((1,), [(1, 1)], "flat kernel for M = 1, else XLA (M1 = 1, M2 = 2)"),
    ((16, 32), [(9, 32)], "flat kernel for M = 9 to 32, else XLA (M1 = 9, M2 = 33)"),
    ((1, 64), [(1, 1), (33, 64)], "flat kernel for M = 1 and 33 to 64, else XLA"),
], ids=str)  # fmt: skip
def test_crossovers(fast, ranges, words):
    found = tuned({M: 0.5 if M in fast else 2 for M in reversed(BUCKETS)})
    assert report.kernel_ranges(found) == ranges
    assert report.crossovers(found) == [f"qkv  {words}"]


def test_gains_over_static_choices():
    found = tuned({1: 0.8, 8: 1.25}) + tuned({1: 2.0}, part="down")
    lines = [line.split() for line in report.products(found)]
    assert lines[1][:2] == ["qkv", "1"]
    times, gains = ["80.0", "100.0", "80.0"], ["25.0", "%", "0.0", "%", "25.0", "%"]
    assert lines[1][-9:] == [*times, *gains]
    times, gains = ["100.0", "100.0", "125.0"], ["0.0", "%", "25.0", "%", "0.0", "%"]
    assert lines[2][-9:] == [*times, *gains]
    # At 1 token the kernel for one and XLA for the other: 180 µs against 200 and 280.
    times, gains = ["180.0", "200.0", "280.0"], ["11.1", "%", "55.6", "%", "11.1", "%"]
    assert lines[4] == ["layer", "1", *times, *gains]
    assert len(lines) == 5, "no sum where a product is missing"
    with_head = [line.split() for line in report.products(found + tuned({1: 0.8}, part="head"))]
    assert with_head[-1] == lines[4], "the head is no part of a layer"
