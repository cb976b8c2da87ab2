"""The commands of `jaxinfer`, and how arguments become one of them."""

import contextlib
import difflib
import io
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Union, cast

import tyro
from tyro.conf import subcommand

from jaxinfer.cli import calibrate, chat, convert, errors, eval, generate, info, tune

PROG = "jaxinfer"
DESCRIPTION = """Fast large-language-model inference from JAX.

Examples:
  jaxinfer generate "Why is the sky blue?"
  jaxinfer chat
  jaxinfer info
  jaxinfer --version

Every command has its own help with examples: jaxinfer generate --help
"""

_MODULES: dict[type, Any] = {
    generate.Generate: generate,
    chat.Chat: chat,
    eval.Eval: eval,
    calibrate.Calibrate: calibrate,
    tune.Tune: tune,
    info.Info: info,
    convert.Convert: convert,
}
COMMANDS = {kind.__name__.lower(): kind for kind in _MODULES}
_TASKS = {"eval": "perplexity", "calibrate": "softmax"}  # the second word of a command


def parse(arguments: Sequence[str]) -> Any:
    """The command that arguments ask for, an object with `run()`.

    Raises:
        UsageError: wrong arguments.
        SystemExit: help was asked for and printed.
    """
    named = next(iter(arguments), None)
    if named not in COMMANDS:
        if named is not None and not named.startswith("-"):
            raise errors.UsageError(_unknown(named))
        named = None
    given = list(arguments)
    if named in _TASKS:
        given[:2] = _both_words(named, given[1:])
    # The list of commands shows a line of each, the help of one command its examples too.
    kinds = [
        Annotated[
            kind,
            subcommand(_full_name(name), description=_description(kind, whole=name == named)),
        ]
        for name, kind in COMMANDS.items()
    ]
    with (
        _usage_that_works(),
        errors.one_line_usage(f"{PROG} {_full_name(named)} --help" if named else f"{PROG} --help"),
    ):
        return tyro.cli(
            cast(Any, Union[tuple(kinds)]),  # noqa: UP007  (made at run time)
            prog=PROG,
            description=DESCRIPTION,
            args=given,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )


def _unknown(command: str) -> str:
    near = difflib.get_close_matches(command, COMMANDS, n=1)
    known = f"perhaps you meant {near[0]}" if near else f"known are {', '.join(COMMANDS)}"
    return f"unknown command {command!r} ({known}; see {PROG} --help)"


class _Printed(io.StringIO):
    def isatty(self) -> bool:
        return sys.__stdout__ is not None and sys.__stdout__.isatty()


@contextlib.contextmanager
def _usage_that_works() -> Iterator[None]:
    """Put `--text FILE`, which is needed, into the line of usage, which names no options."""
    box = _Printed()
    try:
        with contextlib.redirect_stdout(box):
            yield
    finally:
        for task in _TASKS.values():
            line = f"[{task.upper()} OPTIONS] MODEL"
            box = io.StringIO(box.getvalue().replace(line, f"{line} --text FILE", 1))
        sys.stdout.write(box.getvalue())


def _full_name(command: str) -> str:
    return f"{command} {_TASKS[command]}" if command in _TASKS else command


def _both_words(command: str, rest: list[str]) -> list[str]:
    """What stands for a command of two words and the argument after the first."""
    if rest[:1] == [_TASKS[command]]:
        return [_full_name(command)]
    if not {"-h", "--help"}.isdisjoint(rest):
        return [_full_name(command), *rest[:1]]
    came = f"; got {rest[0]!r}" if rest else ""
    raise errors.UsageError(
        f"{command} needs {_TASKS[command]} as its next word{came} "
        f"(see {PROG} {_full_name(command)} --help)"
    )


def _description(kind: type, *, whole: bool) -> str:
    first, _, rest = (kind.__doc__ or "").partition("\n")
    if not whole:
        return first
    paragraphs = [" ".join(part.split()) for part in rest.split("\n\n")]
    examples = (f"  {line}" for line in _MODULES[kind].EXAMPLES.strip().splitlines())
    shown = [first, *filter(None, paragraphs), "\n".join(["Examples:", *examples])]
    return "\n\n".join(shown)
