"""`watched`: inside of it a process that fails or is lost ends all processes of the program."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax

from jaxinfer.distributed import last_words
from jaxinfer.distributed.group import Group
from jaxinfer.distributed.watch import FAILED, UNREACHABLE, Watch

_INTERRUPTED = 130  # 128 + SIGINT, as shells have it

Report = Callable[[BaseException], tuple[int, str]]
"""Writes an error; gives the exit code, and what the other processes are told of it."""


@contextlib.contextmanager
def watched(timeout_s: float = 60, *, report: Report | None = None) -> Iterator[Group]:
    """Compute together with the other processes inside, and end where one of them is lost.

    To be entered by all processes, none later than `timeout_s` after the first. At its end all wait
    for each other; `jax.distributed` stays connected.

    An exception inside, `KeyboardInterrupt` and `SystemExit` too, ends this process at once,
    without what Python does at exit: JAX would wait for the other processes there, and they may
    wait for this one. They end with its message. Where another process is lost, this one ends with
    a line that says which, and exit code 1: whoever waits in a collective cannot be reached by an
    exception.

    Args:
        timeout_s: A process that is not heard of for so long is lost. Less than the
            `heartbeat_timeout_seconds` of `jax.distributed.initialize` (100), after which JAX
            aborts the process.
        report: What to do with an exception; default: write its traceback.

    Yields:
        The processes, as this one sees them.

    Raises:
        ValueError: `timeout_s` is not positive.
        RuntimeError: `jax.distributed.initialize` was not called.
    """
    if not timeout_s > 0:
        raise ValueError(f"timeout_s must be positive; got {timeout_s}")
    if not jax.distributed.is_initialized():
        raise RuntimeError("watched() needs other processes: call jax.distributed.initialize first")
    with last_words.spoken_on_abort():
        group = Group(timeout_s)
        try:
            group.begin()
            yield group
            group.finish()
        except BaseException as error:
            end(error, report or _show, group.watch)


def end(error: BaseException, report: Report, watch: Watch | None = None) -> NoReturn:
    """End this process because of an error, and tell the others, not waiting for them.

    Args:
        error: The reason.
        report: As in `watched`.
        watch: By which to tell the others; None: they are not connected.
    """
    last_words.claim()
    code = FAILED
    try:
        code, reason = report(error)
        if watch is not None:
            watch.tell(reason)
    finally:  # also after another Ctrl-C
        os._exit(code)


def meaning(error: BaseException) -> BaseException:
    """In place of what JAX says when another process has gone, what that means.

    The main thread may notice before `Watch` and JAX's own threads do, in a collective or in a call
    of the store.
    """
    text = str(error)
    if not isinstance(error, jax.errors.JaxRuntimeError):
        return error
    if text.startswith("UNAVAILABLE") and "CoordinationService" in text:
        lost = RuntimeError(UNREACHABLE)
    elif any(sign in text for sign in ("Gloo", "NCCL", "ollective")):
        lost = RuntimeError(f"the connection to another process was lost ({text[:200]})")
    else:
        return error
    lost.__cause__ = error
    return lost


def _show(error: BaseException) -> tuple[int, str]:
    """As Python does at the end of a program, and a line where another process is the reason."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return error.code or 0, f"it has exited with {error.code or 0}"
        print(error.code, file=sys.stderr, flush=True)
        return FAILED, " ".join(str(error.code).split())
    sys.excepthook(type(error), error, error.__traceback__)
    if (lost := meaning(error)) is not error:
        print(f"error: {lost}", file=sys.stderr, flush=True)
        return FAILED, str(lost)
    if isinstance(error, KeyboardInterrupt):
        return _INTERRUPTED, "interrupted"
    return FAILED, " ".join(f"{type(error).__name__}: {error}".split())
