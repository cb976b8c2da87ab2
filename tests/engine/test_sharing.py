"""One `LLM` used from several threads, and streams that nobody reads to their end."""

import functools
import gc
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxinfer import LLM
from tests.cli.command import REPOSITORY
from tests.engine.small import GREEDY, alone, assert_idle, shared_llm

LONG = GREEDY.replace(max_tokens=40)


@pytest.fixture
def made():
    yield shared_llm()
    assert_idle(shared_llm())


@functools.cache
def answer(prompt: str, max_tokens: int = 40) -> list[int]:
    return alone(prompt, max_tokens)


def at_once(*works: Callable[[], object]) -> list[object]:
    """Results of functions that run in threads of their own, started together."""
    barrier = threading.Barrier(len(works))

    def run(work: Callable[[], object]) -> object:
        barrier.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result(timeout=120) for future in [pool.submit(run, w) for w in works]]


def generates(made: LLM, *prompts: str, times: int = 4) -> Callable[[], object]:
    def work() -> list[list[int]]:
        outputs = [o for _ in range(times) for o in made.generate(list(prompts), LONG)]
        return [output.outputs[0].token_ids for output in outputs]

    return work


def streams(made: LLM, prompt: str) -> list[int]:
    return [t for output in made.stream(prompt, LONG) for t in output.outputs[0].token_ids]


def test_threads_get_the_answers_of_one_after_another(made):
    prompts = ["hello", "b", "xyz", "another one"]
    expected = [[answer(p)] * 4 for p in prompts]
    assert at_once(*(generates(made, p) for p in prompts)) == expected


def test_more_threads_than_rows_with_streams_and_chats(made):
    talk = [{"role": "user", "content": "Hi"}]
    [said] = made.chat(talk, LONG)
    works = [
        *(generates(made, f"prompt {i}", "hello", times=2) for i in range(4)),
        *(functools.partial(streams, made, f"stream {i}") for i in range(3)),
        lambda: made.chat(talk, LONG)[0].outputs[0].token_ids,
    ]
    got = at_once(*works)
    for i in range(4):
        assert got[i] == [answer(f"prompt {i}"), answer("hello")] * 2
    assert got[4:7] == [answer(f"stream {i}") for i in range(3)]
    assert got[7] == said.outputs[0].token_ids


def test_a_stream_that_rests_does_not_hold_others_up(made):
    resting = made.stream("hello", LONG)
    first = next(resting).outputs[0].token_ids
    assert at_once(generates(made, "b", times=1)) == [[answer("b")]]
    rest = [t for output in resting for t in output.outputs[0].token_ids]
    assert first + rest == answer("hello")


def test_streams_that_are_dropped_in_one_thread_leave_the_others_alone(made):
    def drop() -> None:
        for i in range(6):
            stream = made.stream(f"drop {i}", LONG)
            next(stream)
            if i % 2:
                stream.close()
            del stream
        gc.collect()

    got = at_once(generates(made, "hello"), drop, drop, generates(made, "b"))
    assert got[0] == [answer("hello")] * 4
    assert got[3] == [answer("b")] * 4


def test_one_that_is_dropped_during_a_step_goes_before_the_next(made, monkeypatch):
    """The collector may finalise a stream inside of a step of its own thread."""
    held = [made.stream("hello", LONG)]
    next(held[0])
    step = made.engine.step

    def dropping():
        held.clear()
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(made.engine, "step", dropping)
        [output] = made.generate("b", LONG)
    assert output.outputs[0].token_ids == answer("b")


def test_an_error_in_the_thread_that_drives_is_its_own(made, monkeypatch):
    """The others go on: what was computed is computed again."""
    step, failing = made.engine.step, threading.Event()

    def broken():
        if not failing.is_set() and len(made.engine._scheduler.running) == 2:
            failing.set()
            raise OSError("once")
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(made.engine, "step", broken)
        failed, got = [], []

        def work(prompt: str) -> None:
            try:
                [output] = made.generate(prompt, LONG)
                got.append((prompt, output.outputs[0].token_ids))
            except OSError:
                failed.append(prompt)

        at_once(*(functools.partial(work, p) for p in ("hello", "b")))
    assert len(failed) == 1
    assert got == [(p, answer(p)) for p in ("hello", "b") if p not in failed]


def test_what_the_engine_refuses_late_reaches_its_thread(made, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("name in use")

    with monkeypatch.context() as patch:
        patch.setattr(made.engine, "add_request", refuse)
        with pytest.raises(ValueError, match="name in use"):
            made.generate("b", LONG)


def test_a_script_that_ends_with_a_half_read_stream_is_silent():
    script = (
        "from tests.engine.small import GREEDY, llm\n"
        "made = llm()\n"
        "pieces = made.stream('hello', GREEDY)\n"
        "print(len(next(pieces).outputs))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=REPOSITORY,
        timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")
