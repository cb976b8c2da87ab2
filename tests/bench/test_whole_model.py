"""The end-to-end benchmarks, with a tiny model in the place of a real one."""

import jax
import numpy as np
import pytest

from bench import torch_peer, whole_model
from bench.case import WrongResult
from bench.cases.e2e_decode import DecodeCase
from bench.cases.e2e_prefill import PrefillCase
from bench.whole_model import Progress, check_runner
from jaxinfer.models.config import DecoderConfig
from jaxinfer.pallas_kernels.device import current_device
from jaxinfer.pallas_kernels.dispatch import NotSupported

_HELD = (
    whole_model.model_of, whole_model.engine_of, whole_model.plain_of, whole_model.check_runner,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """A model named tiny; nothing of it is kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(whole_model.MODELS, "tiny", DecoderConfig.tiny)
        yield
    for held in _HELD:
        held.cache_clear()


@pytest.mark.parametrize("runner", ["xla", "plain_xla"])
@pytest.mark.parametrize(
    ("case", "tokens"),
    [(PrefillCase(model="tiny", T=64), 64), (DecodeCase(model="tiny", B=2, S=80, rows=2), 2)],
    ids=["prefill", "decode"],
)
def test_a_case_is_checked_and_timed(case, tokens, runner):
    measured = case.measure(runner, repeats=1)
    assert measured.median_us > 0
    assert measured.compile_s > 0
    assert 0 <= measured.rel_rms < 2e-2
    rate = tokens * 1e6 / measured.median_us
    assert measured.extra["tokens_per_s"] == pytest.approx(rate, rel=1e-6)


def test_ragged_requests_are_counted_as_they_are():
    case = DecodeCase(model="tiny", B=3, S=300, ragged=True, rows=4)
    lengths = case._lengths
    assert max(lengths) == 300 - 64
    assert min(lengths) >= 100
    assert lengths == case._lengths, "the same for every implementation"
    uniform = DecodeCase(model="tiny", B=3, S=300, rows=4)
    assert uniform.bytes - case.bytes == whole_model.kv_bytes(
        DecoderConfig.tiny(), 3 * 236 - sum(lengths)
    )
    assert case.measure("xla", repeats=1).median_us > 0


@pytest.mark.parametrize("runner", whole_model.ABLATIONS[:4])
def test_one_op_in_plain_jax(runner):
    op = runner.removeprefix("dispatch-no-")
    assert whole_model._engine("tiny", whole_model.model_of("tiny"), runner, 2, 128)
    assert whole_model._forced(runner) == f"{op}=xla"
    assert check_runner("tiny", runner) < 2e-2


@pytest.mark.parametrize(("runner", "steps"), [("dispatch", 8), (whole_model.SINGLE_STEPS, 1)])
def test_steps_in_one_program(runner, steps):
    made = whole_model._engine("tiny", whole_model.model_of("tiny"), runner, 2, 128)
    assert made.config.steps_per_sync == 8
    assert made.config.steps_per_program == steps
    assert check_runner("tiny", runner) < 2e-2


@pytest.mark.parametrize("runner", torch_peer.RUNNERS)
def test_the_peer_of_torch_has_our_weights(runner):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    assert check_runner("tiny", runner) < 2e-2


def test_cudnn_needs_a_gpu():
    if current_device().platform == "gpu":
        pytest.skip("this machine has a GPU")
    with pytest.raises(NotSupported, match="plain_cudnn"):
        check_runner("tiny", "plain_cudnn")


def test_a_runner_with_wrong_logits_is_refused(monkeypatch):
    plain = whole_model._plain_logits
    monkeypatch.setattr(whole_model, "_plain_logits", lambda *args: 1.1 * np.asarray(plain(*args)))
    with pytest.raises(WrongResult, match=r"logits differ by \d\.\de-0[12]"):
        check_runner.__wrapped__("tiny", "xla")


def test_an_engine_with_wrong_weights_is_refused(monkeypatch):
    right = whole_model._engine

    def wrong(name, model, *rest):
        return right(name, jax.tree.map(lambda weight: 1.1 * weight, model), *rest)

    monkeypatch.setattr(whole_model, "_engine", wrong)
    with pytest.raises(WrongResult, match="logits differ"):
        check_runner.__wrapped__("tiny", "xla")


def test_time_per_token_leaves_out_the_first_ones():
    progress = Progress(events=[(1.0, 1), (5.0, 9), (6.0, 17), (8.0, 25)])
    assert progress.us_per_token(skip=8) == pytest.approx(3.0 / 16 * 1e6)
