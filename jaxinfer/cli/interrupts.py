"""Ctrl-C: ends a start at once, and later becomes a KeyboardInterrupt that cannot get lost.

An exception that is raised while modules are imported may come out as an ImportError or not at all,
and one that is raised in a callback of the garbage collector is printed and forgotten.
"""

import _thread
import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

_AGAIN_S, _LONGEST_S = 0.02, 5.0
_LOSING = frozenset({"_xla_gc_callback", "__del__", "_find_and_load"})  # the last one: an import


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Inside, Ctrl-C ends the process with 130, and after `work_begins` raises KeyboardInterrupt.

    Nothing changes outside of the main thread, and where Ctrl-C is ignored or someone else's.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def work_begins() -> None:
    """From here on there may be something to clean up: a download, a file, a bar on a terminal."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, _Interrupt())


def _leave(number: int, frame: FrameType | None) -> None:
    del number, frame
    os.write(2, b"error: interrupted\n")
    os._exit(130)


class _Interrupt:
    """Raises KeyboardInterrupt, as soon as it would not be lost or that has taken too long."""

    def __init__(self) -> None:
        self._since: float | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        del number
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        if _would_be_lost(frame) and now - self._since < _LONGEST_S:
            again = threading.Timer(_AGAIN_S, self._repeat)
            again.daemon = True
            again.start()
        else:
            self._since = None
            raise KeyboardInterrupt

    def _repeat(self) -> None:
        if signal.getsignal(signal.SIGINT) is self:  # else the command has ended meanwhile
            _thread.interrupt_main()


def _would_be_lost(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name in _LOSING:
            return True
        frame = frame.f_back
    return False
