"""Bars on a terminal, lines elsewhere."""

import io

import jax
import jax.numpy as jnp
import pytest

from jaxinfer import progress
from jaxinfer.progress import CompileWatch, Reporter


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
    steps = []
    with CompileWatch(lambda *step: steps.append(step)) as watch:
        jax.jit(lambda x: x * 3.25 + 1)(jnp.ones(7)).block_until_ready()
    count = watch.count
    assert count >= 1
    assert watch.seconds > 0
    assert steps[-1] == ("compile", count, 0)
    jax.jit(lambda x: x * 4.25 - 1)(jnp.ones(9)).block_until_ready()
    assert watch.count == count
