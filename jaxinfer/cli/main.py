"""The `jaxinfer` command: parses arguments, runs a command, reports errors in one line."""

import importlib.metadata
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Union, cast

import tyro
from tyro.conf import subcommand

from jaxinfer.cli import chat, convert, errors, eval, generate, info

PROG = "jaxinfer"
DESCRIPTION = """Fast large-language-model inference from JAX.

Examples:
  jaxinfer generate "Why is the sky blue?"
  jaxinfer chat
  jaxinfer info

Every command has its own help with examples: jaxinfer generate --help
"""

_MODULES: dict[type, Any] = {
    generate.Generate: generate,
    chat.Chat: chat,
    eval.Eval: eval,
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
    named = named if named in COMMANDS else None
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


def _description(kind: type, *, whole: bool) -> str:
    first, _, rest = (kind.__doc__ or "").partition("\n")
    if not whole:
        return first
    paragraphs = [" ".join(part.split()) for part in rest.split("\n\n")]
    examples = (f"  {line}" for line in _MODULES[kind].EXAMPLES.strip().splitlines())
    shown = [first, *filter(None, paragraphs), "\n".join(["Examples:", *examples])]
    return "\n\n".join(shown)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Default: those of the process.

    Returns:
        0; 2 for wrong arguments and bad input; 1 for other failures; 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        print(f"{PROG} {importlib.metadata.version(PROG)}")
        return 0
    debug = "--debug" in arguments
    try:
        return parse(arguments or ["--help"]).run()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except BrokenPipeError:
        errors.silence_stdout()
        return errors.FAILED
    except (Exception, KeyboardInterrupt) as error:
        return errors.report(error, debug=debug)
