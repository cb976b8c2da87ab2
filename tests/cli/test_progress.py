"""Bars on a terminal, lines elsewhere."""

import io
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from jaxinfer import progress
from jaxinfer.cli.answer import Answer, stream_answer
from jaxinfer.outputs import CompletionOutput, FinishReason
from jaxinfer.progress import CompileWatch, Reporter
from jaxinfer.sampling_params import SamplingParams


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_without_control_characters(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 3.5, 6.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    with Reporter(stream).task("download", unit="bytes") as step:
        for done in (1_000_000, 2_000_000, 4_000_000):
            step("model", done, 4_000_000)
    assert stream.getvalue() == "download: 2.0/4.0 MB (50 %)\ndownload: 4.0 MB in 6.0 s\n"


def test_one_is_no_plural(monkeypatch):
    clock = iter([0.0, 3.0, 3.0, 6.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    with Reporter(stream).task("evaluate", unit="tokens") as step:
        for done in (0, 1):
            step("evaluate", done, 1)
    assert stream.getvalue() == "evaluate: 0/1 token (0 %)\nevaluate: 1 token in 6.0 s\n"


def test_lines_that_foresee_the_end(monkeypatch):
    clock = iter([0.0, 3.0, 6.0, 9.0, 9.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    with Reporter(stream).task("tune", unit="products", foresee=True) as step:
        for done in (0, 1, 2):
            step("qkv", done, 4)
    assert stream.getvalue().splitlines() == [
        "tune: 0/4 products (0 %)",
        "tune: 1/4 products (25 %), about 18 s left",
        "tune: 2/4 products (50 %), about 9 s left",
        "tune: 2 products in 9.0 s",
    ]


def test_a_bar_that_foresees_the_end():
    stream = Terminal()
    with Reporter(stream).task("tune", unit="products", foresee=True) as step:
        step("qkv", 1, 2)
    assert "left" in stream.getvalue()


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()])
def test_a_late_task_that_has_nothing_to_do_shows_nothing(stream, monkeypatch):
    clock = iter([0.0, 9.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with Reporter(stream).task("download", unit="bytes", late=True):
        pass
    assert stream.getvalue() == ""


def test_a_late_bar_appears_with_the_first_step():
    stream = Terminal()
    with Reporter(stream).task("download", unit="bytes", late=True) as step:
        assert stream.getvalue() == ""
        step("model", 1, 2)
    assert "download" in stream.getvalue()


def test_a_quick_quiet_task_says_nothing():
    stream = io.StringIO()
    with Reporter(stream).task("compile", quiet=True) as step:
        step("compile", 3, 0)
    assert stream.getvalue() == ""


def test_no_closing_line_after_an_error():
    stream = io.StringIO()
    with pytest.raises(RuntimeError), Reporter(stream).task("load"):
        raise RuntimeError
    assert stream.getvalue() == ""


def test_bars_on_a_terminal_are_removed():
    stream = Terminal()
    with Reporter(stream).task("load", unit="weights") as step:
        step("embed", 1, 2)
        step("head", 2, 2)
    text = stream.getvalue()
    assert "load" in text
    assert "\x1b[" in text
    assert text.rstrip().endswith("\x1b[2K")  # the line is erased


def test_plain_on_a_terminal():
    stream = Terminal()
    with Reporter(stream, mode="plain").task("load") as step:
        step("embed", 1, 1)
    assert "\x1b" not in stream.getvalue()


def test_off_is_silent():
    stream = Terminal()
    reporter = Reporter(stream, mode="off")
    with reporter.task("load") as step:
        step("embed", 1, 1)
    reporter.note("hello")
    assert stream.getvalue() == ""


def test_unknown_mode():
    with pytest.raises(ValueError, match="auto, plain or off"):
        Reporter(mode="loud")


def test_compile_watch_counts_only_inside():
    with CompileWatch() as watch:
        jax.jit(lambda x: x * 3.25 + 1)(jnp.ones(7)).block_until_ready()
    count = watch.count
    assert count >= 1
    assert watch.seconds > 0
    jax.jit(lambda x: x * 4.25 - 1)(jnp.ones(9)).block_until_ready()
    assert watch.count == count


class Chunks:
    """An `LLM` whose answer comes in two pieces."""

    def __init__(self, tokens: int, reason: FinishReason | None = "length"):
        self.engine = SimpleNamespace(config=SimpleNamespace(max_model_len=40))
        self._pieces = [(tokens - 1, None), (1, reason)]

    def stream(self, *_):
        for count, reason in self._pieces:
            part = CompletionOutput(
                index=0, text="x" * count, token_ids=[7] * count, finish_reason=reason
            )
            yield SimpleNamespace(outputs=[part])


@pytest.mark.parametrize(
    ("tokens", "reason", "end"),
    [
        (9, "length", "cut off at --max-tokens"),
        (8, "length", "the context of 40 tokens is full (--max-model-len)"),
        (8, "stop", r"first token after [\d.]+ s"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_ended_an_answer(tokens, reason, end):
    answer, made = Answer(), Chunks(tokens, reason)
    params = SamplingParams(max_tokens=9)
    stream_answer(made, [1], params, lambda _: None, Reporter(mode="off"), answer)  # type: ignore[arg-type]
    end = end if reason == "stop" else re.escape(end)
    assert re.search(rf"^{tokens} tokens, .*{end}$", answer.speed())


@pytest.mark.usefixtures("unchecked")
def test_waiting_for_the_first_token_is_not_called_compiling(monkeypatch):
    """The time shown beside it holds the prompt's computation too."""
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 0.0)
    stream = io.StringIO()
    answer, made = Answer(), Chunks(3)
    stream_answer(made, [1], SamplingParams(), lambda _: None, Reporter(stream), answer)  # type: ignore[arg-type]
    assert re.fullmatch(r"first token: [\d.]+ s\n", stream.getvalue())
