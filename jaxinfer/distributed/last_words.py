"""The one line of an error with which the process ends, also where JAX aborts it.

Where the coordinator dies, or refuses this process, JAX writes a stack trace and calls `abort`. It
takes a callback instead, which cannot be used: with JAX 0.11.2 its argument has no Python type.
"""

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterator

_MESSAGE = (
    b"error: JAX has ended this process: process 0 has died, cannot be reached or was told of "
    b"fewer processes, or two processes have the same id; what JAX says of it stands above\n"
)

_WRITING_S = 1.0  # for an error that another thread is writing


@contextlib.contextmanager
def spoken_on_abort() -> Iterator[None]:
    """Inside, `abort` ends the process with a line and exit code 1."""
    # Not by the signal module: Python's handlers run later, in the main thread, and there is no
    # later here.
    before = _SIGNAL(signal.SIGABRT, ctypes.cast(_HANDLER, ctypes.c_void_p))
    try:
        yield
    finally:
        _SIGNAL(signal.SIGABRT, before)


def claim() -> None:
    """Let only the first of the threads that want to end the process go on and say why.

    The others wait here until it has done so.
    """
    if not _claimed.acquire(blocking=False):
        threading.Event().wait()


def hush() -> None:
    """Let nothing follow the error: what JAX and Gloo find while all leave are consequences."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _speak(number: int) -> None:
    del number
    if _claimed.acquire(blocking=False):
        os.write(2, _MESSAGE)
    else:
        time.sleep(_WRITING_S)
    os._exit(1)


_SIGNAL = ctypes.CDLL(None).signal
_SIGNAL.argtypes = [ctypes.c_int, ctypes.c_void_p]
_SIGNAL.restype = ctypes.c_void_p
_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)(_speak)
_claimed = threading.Lock()
