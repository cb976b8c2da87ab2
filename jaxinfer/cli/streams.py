"""Standard streams that are closed, or whose encoding lacks characters."""

import contextlib
import io
import os
import sys

from jaxinfer.cli.errors import UsageError, silence_stdout


def prepare() -> None:
    """Make the streams of the process usable.

    What standard output cannot encode becomes a question mark. Where standard error is closed, what
    would go there is dropped; a file that is opened later must not become standard output or error.

    Raises:
        UsageError: standard output is closed, so that the answer could go nowhere.
    """
    for descriptor in range(3):
        with contextlib.suppress(OSError):
            os.fstat(descriptor)
            continue
        os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (open until the process ends)
    if sys.stdout is None:
        raise UsageError("standard output is closed; > /dev/null drops what goes there")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def finish() -> None:
    """Write what is left while errors can still be told; nothing is left for the end of Python.

    Raises:
        OSError: standard output takes no more.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        silence_stdout()
        raise


def check_stdin() -> None:
    """Raise UsageError if standard input is closed."""
    if sys.stdin is None:
        raise UsageError("standard input is closed")


def read_stdin() -> bytes:
    """All of standard input.

    Raises:
        UsageError: it is closed.
    """
    check_stdin()
    return sys.stdin.buffer.read()


def stdout_is_unicode() -> bool:
    """Whether standard output can encode everything."""
    return (sys.stdout.encoding or "").lower().replace("-", "") in ("utf8", "utf16", "utf32")
