"""A line after JAX has aborted the process.

Where the coordinator dies, or refuses this process, JAX writes a stack trace and calls `abort`. It
takes a callback instead, which cannot be used: with JAX 0.11.2 its argument has no Python type.
"""

import ctypes
import os
import signal

_message = (
    b"error: JAX has ended this process: process 0 has died or cannot be reached, or two processes "
    b"have the same id; what JAX says of it stands above\n"
)


def speak_on_abort() -> None:
    """From now on `abort` ends the process with a line and exit code 1."""
    # Not by the signal module: Python's handlers run later, in the main thread, and there is no
    # later here.
    handler = _SIGNAL.argtypes[1](_speak)
    _KEPT.append(handler)
    _SIGNAL(signal.SIGABRT, handler)


def be_silent() -> None:
    """An error has been written already; `abort` ends the process all the same."""
    global _message
    _message = b""


def _speak(number: int) -> None:
    del number
    os.write(2, _message)
    os._exit(1)


_SIGNAL = ctypes.CDLL(None).signal
_SIGNAL.argtypes = [ctypes.c_int, ctypes.CFUNCTYPE(None, ctypes.c_int)]
_SIGNAL.restype = ctypes.c_void_p
_KEPT: list[object] = []
