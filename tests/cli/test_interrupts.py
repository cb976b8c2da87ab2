"""Ctrl-C at any time: one line and 130."""

import gc
import importlib
import signal
import subprocess
import sys
import time

import pytest

from jaxinfer.cli import interrupts
from tests.cli.command import REPOSITORY


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


# What comes before the line is Python's own start, whose answer to Ctrl-C is Python's.
_MAIN = (
    "import sys; from jaxinfer.cli.main import main; "
    "print('started', file=sys.stderr, flush=True); sys.exit(main())"
)


# While modules of ours are imported, JAX is, extensions are initialised, and a model is read.
@pytest.mark.parametrize("wait", [0.05, 0.3, 0.5, 0.8, 1.1, 1.5])
def test_at_the_start(tiny, wait):
    arguments = ("generate", "Hello", "--model", tiny, "--max-tokens", "400", "--progress", "off")
    process = subprocess.Popen(
        [sys.executable, "-c", _MAIN, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY,
    )  # fmt: skip
    assert process.stderr is not None
    assert process.stderr.readline() == "started\n"
    time.sleep(wait)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert err == "error: interrupted\n"
    assert process.returncode == 130


def test_one_that_the_collector_swallows_comes_again(working):
    """In a callback of it, as JAX has one, in a finaliser, or in several one after another."""
    seen = []

    def callback(*_):
        if not seen:
            seen.append("callback")
            signal.raise_signal(signal.SIGINT)

    class Finalised:
        def __del__(self):
            seen.append("finaliser")
            signal.raise_signal(signal.SIGINT)

    def work():
        gc.collect()
        Finalised()
        seen.append("work")
        wait_for_it()

    gc.callbacks.append(callback)
    try:
        with pytest.raises(KeyboardInterrupt):
            work()
    finally:
        gc.callbacks.remove(callback)
    assert seen[0] == "callback"


def test_other_errors_of_finalisers_are_shown(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", lambda report: shown.append(str(report.exc_value)))
    before = sys.unraisablehook

    class Finalised:
        def __del__(self):
            raise ValueError("mine")

    with interrupts.handled():
        interrupts.work_begins()
        Finalised()
    assert shown == ["mine"]
    assert sys.unraisablehook is before


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
