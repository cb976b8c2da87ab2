"""Ctrl-C at any time: one line and 130."""

import gc
import importlib
import os
import signal
import subprocess
import sys
import time

import pytest

from jaxinfer.cli import interrupts
from jaxinfer.cli.main import main
from tests.cli.command import REPOSITORY, command, kept_programs, write_tiny_model


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


_AT_EXIT = (
    "import atexit, signal, sys; from jaxinfer.cli.main import main; "
    "atexit.register(signal.raise_signal, signal.SIGINT); sys.exit(main())"
)


# Wrong arguments, what takes no work, and what does.
@pytest.mark.parametrize("task", ["convert", "--version", "generate"])
def test_at_the_end(tiny, task):
    """While Python does what it does at exit, where JAX has something to do too."""
    options = ("Hello", "--model", tiny, "--max-tokens", "2", "--progress", "off")
    done = subprocess.run(
        [sys.executable, "-c", _AT_EXIT, task, *(options if task == "generate" else ())],
        capture_output=True, text=True, cwd=REPOSITORY, check=False, timeout=60,
        env=os.environ | kept_programs(os.environ),
    )  # fmt: skip
    assert done.returncode == -signal.SIGINT
    assert [line[:6] for line in done.stderr.splitlines()] == ["error:"] * (task == "convert")
    assert bool(done.stdout) == (task != "convert")


@pytest.mark.parametrize("wait", [0, 0.004, 0.008, 0.012, 0.02])
def test_after_the_last_line(tiny, wait):
    process = subprocess.Popen(
        command("generate", "Hello", "--model", tiny, "--max-tokens", "2"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY,
        env=os.environ | kept_programs(os.environ),
    )  # fmt: skip
    assert process.stderr is not None
    while not process.stderr.readline().startswith("2 tokens"):
        assert process.poll() is None
    time.sleep(wait)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) in [
        (0, ""), (-signal.SIGINT, ""), (130, "error: interrupted\n")
    ]  # fmt: skip


def test_one_that_comes_after_the_work_is_reported(monkeypatch, capsys):
    """Before the handler of the work has gone."""
    monkeypatch.setattr("jaxinfer.cli.main._run", lambda _: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(interrupts, "_leave", signal.default_int_handler)
    assert main(["--version"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


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


@pytest.fixture
def terminable(monkeypatch):
    """Where SIGTERM ends the process cleanly, and a lost one comes back quickly."""
    monkeypatch.setattr(interrupts, "_AGAIN_S", 0.001)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # put back afterwards


class Dropped:
    """Does something when it is."""

    def __init__(self, action):
        self.action = action

    def __del__(self):
        self.action()


async def complain() -> None:
    raise AttributeError("half made")


def complain_twice() -> None:
    """Of what never ran, and of what went wrong."""
    never_run = complain()
    del never_run
    raise AttributeError("half made")


@pytest.mark.parametrize("seconds", [5, 0], ids=["work goes on", "work is over"])
def test_a_termination_that_a_finaliser_swallows_comes_again(terminable, capsys, seconds):
    seen = []

    def lose() -> None:
        seen.append("lost")
        signal.raise_signal(signal.SIGTERM)

    @interrupts.ended_cleanly()
    def work() -> None:
        Dropped(lose)
        if seconds:
            wait_for_it(seconds)
            seen.append("never")

    with pytest.raises(SystemExit) as stop:
        work()
    assert (stop.value.code, seen) == (143, ["lost"])
    assert capsys.readouterr().err == "error: terminated\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_was_cut_off_does_not_complain(working, terminable, capsys, recwarn, number):
    @interrupts.ended_cleanly()
    def work() -> None:
        half_made = Dropped(complain_twice)
        try:
            signal.raise_signal(number)
        finally:
            del half_made

    with pytest.raises((SystemExit, KeyboardInterrupt)):
        work()
    assert capsys.readouterr().err in ("", "error: terminated\n")
    assert not recwarn.list


def test_one_termination_is_enough(terminable):
    seen = []

    @interrupts.ended_cleanly()
    def work() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            seen.append("cleaned")

    with pytest.raises(SystemExit):
        work()
    assert seen == ["cleaned"]


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


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> str:
    """A model that takes long for a window of 4,096 tokens."""
    sizes = {"hidden_size": 256, "num_layers": 12, "max_position_embeddings": 4096}
    return str(write_tiny_model(tmp_path_factory.mktemp("models") / "slow", **sizes))


@pytest.mark.parametrize("task", [("eval", "perplexity"), ("calibrate", "softmax")])
def test_while_a_text_is_computed(task, tmp_path, slow):
    """XLA's threads are at it; the process must not wait for them, nor die of them."""
    text = tmp_path / "text"
    text.write_text("some words and " * 40_000)
    process = subprocess.Popen(
        command(*task, slow, "--text", str(text), "--window", "4096", "--progress", "plain",
                *(("--out", str(tmp_path / "out")) if task[0] == "calibrate" else ())),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY,
    )  # fmt: skip
    assert process.stderr is not None
    assert process.stderr.readline().startswith("load: ")
    time.sleep(4)  # compilation takes less, a window longer
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (out, err.splitlines()[-1]) == ("", "error: interrupted")
    assert process.returncode == 130


_PIP = """
import os, pathlib, sys, time
pathlib.Path(os.environ["TMPDIR"], "part").write_text("half")
pathlib.Path(os.environ["PID_FILE"]).write_text(str(os.getpid()))
time.sleep(300)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_download_leaves_nothing(tmp_path, number):
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").touch()
    (tmp_path / "pip" / "__main__.py").write_text(_PIP)
    started, cache = tmp_path / "pid", tmp_path / "cache"
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)]),
                   "JAXINFER_CACHE": str(cache), "PID_FILE": str(started)}  # fmt: skip
    process = subprocess.Popen(
        command("generate", "Hi"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | environment,
    )  # fmt: skip
    end = time.monotonic() + 60
    while not (started.exists() and started.read_text()):
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (out, err.splitlines()[-1]) == ("", f"error: {_SAID[number]}")
    assert process.returncode == 128 + number
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
    assert list((cache / "models").iterdir()) == []


_SAID = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> str:
    """A model that takes a while to be written."""
    folder = tmp_path_factory.mktemp("models") / "large"
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_layers": 24}
    return str(write_tiny_model(folder, **sizes))


@pytest.mark.parametrize("wait", [0, 0.2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_conversion_leaves_nothing(tmp_path, large, number, wait):
    """At the start of the writing and in the middle of it."""
    process = subprocess.Popen(
        command("convert", large, str(tmp_path / "out"), "--dtype", "float32",
                "--progress", "off"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY,
    )  # fmt: skip
    end = time.monotonic() + 60
    while not list(tmp_path.glob(".out-*")):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.001)
    while process.poll() is None and not list(tmp_path.glob(".out-*/weights*")):
        time.sleep(0.001)  # what comes before is the check that it can be written there
    time.sleep(wait)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (out, err) == ("", f"error: {_SAID[number]}\n")
    assert process.returncode == 128 + number
    assert not list(tmp_path.iterdir())


def test_one_that_comes_while_the_next_is_prepared_is_not_lost(working, monkeypatch):
    """On a busy machine the next one may come before the thread that sends it has reported."""
    start, sent = interrupts.threading.Timer.start, []

    def start_slowly(timer):
        start(timer)
        if len(sent) < 2:
            sent.append(timer)
            signal.raise_signal(signal.SIGINT)

    class Finalised:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def work():
        Finalised()
        wait_for_it()

    monkeypatch.setattr(interrupts.threading.Timer, "start", start_slowly)
    with pytest.raises(KeyboardInterrupt):
        work()
    assert len(sent) == 2


def test_a_termination_that_comes_while_the_next_is_prepared_is_not_lost(terminable, monkeypatch):
    start, sent = interrupts.threading.Timer.start, []

    def start_slowly(timer):
        start(timer)
        if len(sent) < 2:
            sent.append(timer)
            signal.raise_signal(signal.SIGTERM)

    @interrupts.ended_cleanly()
    def work() -> None:
        Dropped(lambda: signal.raise_signal(signal.SIGTERM))
        wait_for_it()

    monkeypatch.setattr(interrupts.threading.Timer, "start", start_slowly)
    with pytest.raises(SystemExit):
        work()
    assert len(sent) == 2
