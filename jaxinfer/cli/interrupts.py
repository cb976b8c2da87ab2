"""Ctrl-C: ends a start at once, and later becomes a KeyboardInterrupt that cannot get lost.

An exception that is raised while modules are imported may come out as an ImportError or not at all,
and one that is raised in a finaliser or a callback of the garbage collector goes to
`sys.unraisablehook`, and that was all.

SIGTERM ends a process as ever, except while it has a child to end or files to remove first.

What an interrupt leaves half made, an event loop or a coroutine say, may complain when it
is dropped. After one, such complaints are not shown.
"""

import _thread
import contextlib
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from jaxinfer.cli import errors

_AGAIN_S, _LONGEST_S = 0.02, 5.0


@contextlib.contextmanager
def handled(*, last: bool = False) -> Iterator[None]:
    """Inside, Ctrl-C ends the process with 130, and after `work_begins` raises KeyboardInterrupt.

    Nothing changes outside of the main thread, and where Ctrl-C is ignored or someone else's.

    Args:
        last: The process ends afterwards. Ctrl-C then ends it at once: there is nothing to clean
            up, and Python would show a traceback of whatever it does at exit.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    hook = sys.unraisablehook
    signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        afterwards = signal.SIG_DFL if last else signal.default_int_handler
        try:
            signal.signal(signal.SIGINT, afterwards)
        except KeyboardInterrupt:  # one that came just before
            signal.signal(signal.SIGINT, afterwards)
            raise
        finally:
            sys.unraisablehook = hook


def work_begins() -> None:
    """From here on there may be something to clean up: a download, a file, a bar on a terminal."""
    if signal.getsignal(signal.SIGINT) is _leave:
        interrupt = _Interrupt()
        signal.signal(signal.SIGINT, interrupt)
        sys.unraisablehook = interrupt.lost


def leave(code: int) -> NoReturn:
    """End the process without what Python does at exit, once everything is cleaned up.

    A computation that was interrupted goes on in threads of XLA. Python would wait for it, or end
    under its feet, and the process with it ("terminate called without an active exception").
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


@contextlib.contextmanager
def ended_cleanly() -> Iterator[None]:
    """Inside, SIGTERM raises SystemExit (143), so that children and scratch folders go too.

    Nothing changes outside of the main thread, and where SIGTERM is ignored or someone else's.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    termination = _Termination()
    signal.signal(signal.SIGTERM, termination)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if termination.is_lost:
        raise SystemExit(errors.TERMINATED)


class _Termination:
    """Raises SystemExit, and again where it was lost.

    Attributes:
        is_lost: It was raised where nobody sees it, and not again yet.
    """

    def __init__(self) -> None:
        self.is_lost = False
        self._is_known = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Raise it; one is enough, and the cleaning must come to its end."""
        del number, frame
        if self._is_known and not self.is_lost:
            return
        if not self._is_known:
            print("error: terminated", file=sys.stderr, flush=True)
            sys.unraisablehook = self.lost
            _hush()
        self._is_known, self.is_lost = True, False
        raise SystemExit(errors.TERMINATED)

    def lost(self, report: "sys.UnraisableHookArgs") -> None:
        """Stands for `sys.unraisablehook`, to the end of the process."""
        if report.exc_type is SystemExit:
            _undisturbed(self._repeat_soon, by=SystemExit)

    def _repeat_soon(self) -> None:
        self.is_lost = True
        again = threading.Timer(_AGAIN_S, _thread.interrupt_main, [signal.SIGTERM])
        again.daemon = True
        again.start()


def _leave(number: int, frame: FrameType | None) -> None:
    del number, frame
    os.write(2, b"error: interrupted\n")
    os._exit(130)


class _Interrupt:
    """Raises KeyboardInterrupt, and again where it was lost."""

    def __init__(self) -> None:
        self._hook = sys.unraisablehook
        self._since: float | None = None
        self._again: threading.Timer | None = None  # at most one: each raises where it may
        self._raised = -math.inf  # when

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Raise it, unless a module is being imported and that has not taken too long."""
        del number
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        if _imports(frame) and now - self._since < _LONGEST_S:
            self._repeat_soon()
        else:
            self._since = None
            if self._again is not None:
                self._again.cancel()
            self._raised = now
            _hush()
            raise KeyboardInterrupt

    def lost(self, report: "sys.UnraisableHookArgs") -> None:
        """Stands for `sys.unraisablehook`."""
        if report.exc_type is not KeyboardInterrupt:
            if time.monotonic() - self._raised > _LONGEST_S:
                self._hook(report)
            return
        _undisturbed(self._repeat_soon, by=KeyboardInterrupt)

    def _repeat_soon(self) -> None:
        if self._again is not None:
            self._again.cancel()
        self._again = threading.Timer(_AGAIN_S, self._repeat)
        self._again.daemon = True
        self._again.start()

    def _repeat(self) -> None:
        if signal.getsignal(signal.SIGINT) is self:  # else the command has ended meanwhile
            _thread.interrupt_main()


def _undisturbed(repeat_soon: Callable[[], None], *, by: type[BaseException]) -> None:
    """Call it, again if the next one comes in here, where it would be lost too."""
    while True:
        try:
            repeat_soon()
            return
        except by:
            continue


def _hush() -> None:
    """No warnings of coroutines that will not be run any more."""
    warnings.filterwarnings("ignore", r"coroutine '.*' was never awaited", RuntimeWarning)


def _imports(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "_find_and_load":
            return True
        frame = frame.f_back
    return False
