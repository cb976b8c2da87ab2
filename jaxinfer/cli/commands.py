"""The commands of `jaxinfer`, and how arguments become one of them."""

import difflib
from collections.abc import Sequence
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
    # The list of commands shows a line of each, the help of one command its examples too.
    kinds = [
        Annotated[kind, subcommand(name, description=_description(kind, whole=name == named))]
        for name, kind in COMMANDS.items()
    ]
    with errors.one_line_usage(f"{PROG} {named} --help" if named else f"{PROG} --help"):
        return tyro.cli(
            cast(Any, Union[tuple(kinds)]),  # noqa: UP007  (made at run time)
            prog=PROG,
            description=DESCRIPTION,
            args=list(arguments),
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )


def _unknown(command: str) -> str:
    near = difflib.get_close_matches(command, COMMANDS, n=1)
    known = f"perhaps you meant {near[0]}" if near else f"known are {', '.join(COMMANDS)}"
    return f"unknown command {command!r} ({known}; see {PROG} --help)"


def _description(kind: type, *, whole: bool) -> str:
    first, _, rest = (kind.__doc__ or "").partition("\n")
    if not whole:
        return first
    paragraphs = [" ".join(part.split()) for part in rest.split("\n\n")]
    examples = (f"  {line}" for line in _MODULES[kind].EXAMPLES.strip().splitlines())
    shown = [first, *filter(None, paragraphs), "\n".join(["Examples:", *examples])]
    return "\n\n".join(shown)
