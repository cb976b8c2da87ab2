"""Ctrl-C at any time: one line and 130."""

import gc
import importlib
import signal
import subprocess
import time

import pytest

from jaxinfer.cli import interrupts
from tests.cli.command import REPOSITORY, command


@pytest.fixture
def working(monkeypatch):
    """The state of a command whose work has begun, where a lost interrupt comes back quickly."""
    monkeypatch.setattr(interrupts, "_AGAIN_S", 0.001)
    with interrupts.handled():
        interrupts.work_begins()
        yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def wait_for_it(seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.001)


# While modules of ours are imported, JAX is, extensions are initialised, and a model is read.
@pytest.mark.parametrize("wait", [0.15, 0.4, 0.6, 0.8, 1.0, 1.5])
def test_at_the_start(tiny, wait):
    process = subprocess.Popen(
        command("generate", "Hello", "--model", tiny, "--max-tokens", "400", "--progress", "off"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY,
    )  # fmt: skip
    time.sleep(wait)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert err == "error: interrupted\n"
    assert process.returncode == 130


def test_one_that_a_callback_of_the_collector_would_swallow_comes_afterwards(working):
    seen = []

    def _xla_gc_callback(*_):
        if not seen:
            seen.append("collector")
            signal.raise_signal(signal.SIGINT)

    def collect():
        gc.collect()
        seen.append("afterwards")
        wait_for_it()

    gc.callbacks.append(_xla_gc_callback)
    try:
        with pytest.raises(KeyboardInterrupt):
            collect()
    finally:
        gc.callbacks.remove(_xla_gc_callback)
    assert seen == ["collector", "afterwards"]


def test_one_that_comes_during_an_import_comes_afterwards(working, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "interrupting.py").write_text(
        "import signal\ntry:\n    signal.raise_signal(signal.SIGINT)\n"
        "except BaseException as error:\n    raise ImportError from error\n"
    )

    def load():
        importlib.import_module("interrupting")
        wait_for_it()

    with pytest.raises(KeyboardInterrupt):
        load()


def test_an_import_that_takes_too_long_is_interrupted(working, monkeypatch):
    monkeypatch.setattr(interrupts, "_LONGEST_S", 0.05)

    def _find_and_load():
        signal.raise_signal(signal.SIGINT)
        wait_for_it()

    with pytest.raises(KeyboardInterrupt):
        _find_and_load()


def test_each_is_raised(working):
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_who_ignores_it_is_left_alone(handler):
    """As a shell does for what it starts in the background."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        with interrupts.handled():
            interrupts.work_begins()
            assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
