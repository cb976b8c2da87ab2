"""Errors as the command line shows them: one line and an exit code, the traceback on request."""

import contextlib
import io
import os
import re
import sys
import traceback
from collections.abc import Iterator

from jaxinfer.models.errors import CheckpointError

BAD_INPUT = 2
FAILED = 1
INTERRUPTED, TERMINATED = 130, 143  # 128 + SIGINT, + SIGTERM, as shells have it

_MENDABLE = (
    ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError,
)  # fmt: skip

# Arguments of the library that are options of the commands, where they are spelt with hyphens.
OPTIONS = (
    "batch_size", "gpu_memory_utilization", "max_model_len", "max_tokens", "min_p",
    "num_gpu_blocks_override", "repetition_penalty", "top_k", "top_p",
)  # fmt: skip
_OPTION = re.compile(rf"(?<![\w./-])({'|'.join(OPTIONS)})\b")
# Plain words too: options only where a message begins with them, or gives their value.
WORDS = (
    "dtype",
    "implementation",
    "mesh",
    "seed",
    "softmax",
    "stop",
    "stride",
    "temperature",
    "window",
)
_WORD = re.compile(rf"^({'|'.join(WORDS)})(?= (must|axis|of|'))|(?<= )({'|'.join(WORDS)})(?==\d)")

# A line of a list of arguments: an option, or the metavar of a positional.
_ARGUMENT = re.compile(r"(--[a-z-]+|[A-Z]+|\{\S+\})( [A-Z]+)?")

# What Python says of a text that is no number, at the end of what tyro says of all types it tried.
_NO_NUMBER = re.compile(
    r"error parsing (\S+): .*?"
    r"(invalid literal for int\(\) with base 10|could not convert string to float): (.*)"
)


class UsageError(ValueError):
    """Arguments that do not fit together, or a file of the user's that cannot be used."""


def exit_code(error: BaseException) -> int:
    """130 for Ctrl-C, 2 for what the caller can mend, 1 for the rest.

    >>> exit_code(ValueError("temperature must be finite")), exit_code(RuntimeError("disk"))
    (2, 1)
    """
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return BAD_INPUT if isinstance(error, _MENDABLE) else FAILED


def one_line(error: BaseException) -> str:
    """What went wrong, without line breaks, and options as they are typed.

    >>> one_line(ValueError("top_k must be at least 0; got -2"))
    '--top-k must be at least 0; got -2'
    >>> one_line(ValueError("stride must be 1 to window=100 tokens; got 200"))
    '--stride must be 1 to --window=100 tokens; got 200'

    Exceptions that no rule of ours raises are named and point to `--debug`: their text alone
    often means little.
    """
    text = " ".join(str(error).split())
    ours = type(error).__module__.startswith("jaxinfer")
    if isinstance(error, ExceptionGroup):
        text = "; ".join([text, *(one_line(inner) for inner in error.exceptions)])
    elif isinstance(error, OSError) and error.strerror:
        text = ": ".join(part for part in (error.filename, error.strerror) if part)
    elif not ours and type(error) not in (ValueError, RuntimeError, NotImplementedError):
        text = f"{type(error).__name__}: {text} (--debug shows where)"
    if not isinstance(error, CheckpointError):  # the names in one are a file's
        text = _OPTION.sub(lambda found: "--" + found[0].replace("_", "-"), text)
        text = _WORD.sub(lambda found: "--" + found[0], text)
    return text or f"{type(error).__name__} (--debug shows where)"


def report(error: BaseException, *, debug: bool) -> int:
    """Write an error to standard error; the exit code to end with."""
    if debug:
        traceback.print_exception(error)
    print(f"error: {message(error)}", file=sys.stderr, flush=True)
    return exit_code(error)


def message(error: BaseException) -> str:
    """What `report` says of an error."""
    return "interrupted" if isinstance(error, KeyboardInterrupt) else one_line(error)


def silence_stdout() -> None:
    """After a broken pipe: keep the interpreter from complaining when it flushes at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def one_line_usage(help_command: str) -> Iterator[None]:
    """Turn tyro's boxed messages about wrong arguments into one line.

    Args:
        help_command: What to type for help.
    """
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            yield
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(_unbox(box.getvalue(), help_command)) from None


def _unbox(text: str, help_command: str) -> str:
    """The first section of a box, and the nearest option if one is suggested.

    Where the terminal's encoding is not UTF-8, the box has no frame and its title is a section.
    """
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [line.strip(" │") for line in text.splitlines() if line[:1] not in "╭╰"]
    sections: list[list[str]] = [[]]
    for line in filter(None, lines):
        if set(line) in ({"─"}, {"-"}):
            sections.append([])
        else:
            sections[-1].append(line)
    if "╭" not in text:
        sections = sections[1:] or sections
    first = sections[0] or ["wrong arguments"]
    if first[0].startswith("Missing from"):  # each followed by its help text
        first = ["missing:", ", ".join(line for line in first[1:] if _ARGUMENT.fullmatch(line))]
    message = _plainly(" ".join(first))
    hints = _hints(sections[1:], message)
    return f"{message} ({'; '.join([*hints, f'see {help_command}'])})"


def _plainly(message: str) -> str:
    """A message of tyro's in our words, where its own speak of Python or of its workings."""
    message = message[0].lower() + message[1:]
    if found := _NO_NUMBER.fullmatch(message):
        option, said, value = found.groups()
        return f"{option} must be {'an integer' if 'int()' in said else 'a number'}; got {value}"
    if message.startswith("unrecognized or misplaced"):  # each with its command in parentheses
        message = message.partition(" Arguments are applied to")[0].replace(" or misplaced", "")
        message = re.sub(r" \(applied to [^)]*\)", ",", message).rstrip(",")
    return message


def _hints(sections: list[list[str]], message: str) -> list[str]:
    """What else was unknown, and the nearest option, unless the message has them."""
    hints, similar = [], []
    for head, *lines in filter(None, sections):
        if head == "Unrecognized options:":
            hints.append(f"unrecognized: {', '.join(lines)}")
        else:
            similar += [line for line in (head, *lines) if line.startswith("--")]
    said = message.replace(",", " ").split()
    near = [f"perhaps you meant {line}" for line in similar[:1] if line.split()[0] not in said]
    return hints + near
