"""The `jaxinfer` command: runs what its arguments ask for, reports errors in one line."""

import sys
from collections.abc import Sequence

# Nothing that takes long: Ctrl-C is handled from `main` on.
from jaxinfer.cli import compiled, errors, interrupts, streams


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Default: those of the process.

    Returns:
        0; 2 for wrong arguments and bad input; 1 for other failures; 130 after Ctrl-C; 143 where
        SIGTERM ended a download or the writing of a model.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with interrupts.handled(last=arguments is None), compiled.watched():
            code = _run(given)
    except KeyboardInterrupt as error:  # between the end of the work and that of its handler
        code = errors.report(error, debug="--debug" in given)
    if arguments is None and code in (errors.INTERRUPTED, errors.TERMINATED):
        interrupts.leave(code)
    return code


def _run(arguments: list[str]) -> int:
    try:
        streams.prepare()
        if arguments == ["--version"]:
            import importlib.metadata

            print(f"jaxinfer {importlib.metadata.version('jaxinfer')}")
            return 0
        from jaxinfer.cli.commands import parse

        code = parse(arguments or ["--help"]).run()
        streams.finish()
        return code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except BrokenPipeError:
        errors.silence_stdout()
        return errors.FAILED
    except (Exception, KeyboardInterrupt) as error:
        return errors.report(error, debug="--debug" in arguments)
