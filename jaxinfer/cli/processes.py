"""Options of commands that several processes run together, and how these begin and end."""

import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from jaxinfer.cli import errors, interrupts
from jaxinfer.cli.errors import UsageError

if TYPE_CHECKING:
    from jaxinfer.distributed.group import Group

_LAUNCHER = "(default: the launcher's)"
_INITIALIZATION_S, _HEARTBEAT_S = 300, 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """Which processes compute together."""

    distributed: Annotated[
        bool,
        arg(
            help="Compute together with the other processes that run this command, on all their "
            "devices; under Slurm, Open MPI or Kubernetes they find each other. Process 0 has the "
            "prompts and the answer.",
        ),
    ] = False
    coordinator: Annotated[str | None, arg(metavar="HOST:PORT", help_behavior_hint=_LAUNCHER)] = (
        None
    )
    """Where process 0 listens."""
    num_processes: Annotated[int | None, arg(metavar="INT", help_behavior_hint=_LAUNCHER)] = None
    """How many there are."""
    process_id: Annotated[int | None, arg(metavar="INT", help_behavior_hint=_LAUNCHER)] = None
    """Which of them this is, from 0."""
    initialization_timeout: Annotated[
        int | None, arg(metavar="INT", help_behavior_hint=f"(default: {_INITIALIZATION_S})")
    ] = None
    """Give up if not all have come within so many seconds."""
    heartbeat_timeout: Annotated[
        int | None, arg(metavar="INT", help_behavior_hint=f"(default: {_HEARTBEAT_S})")
    ] = None
    """Give up if one is not heard of for so many seconds."""

    def check(self) -> None:
        """Refuse options that do not fit together.

        Raises:
            UsageError: the message names the option.
        """
        given = {
            "--coordinator": self.coordinator, "--num-processes": self.num_processes,
            "--process-id": self.process_id,
            "--initialization-timeout": self.initialization_timeout,
            "--heartbeat-timeout": self.heartbeat_timeout,
        }  # fmt: skip
        for option, value in given.items():
            if value is not None and not self.distributed:
                raise UsageError(f"{option} needs --distributed")
        for name in ("initialization_timeout", "heartbeat_timeout", "num_processes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be positive; got {value}")
        if self.coordinator is not None:
            host, _, port = self.coordinator.rpartition(":")
            if not (host and port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
                raise UsageError(f"--coordinator must be HOST:PORT; got {self.coordinator!r}")
        if self.process_id is not None:
            below = "" if self.num_processes is None else f" and below {self.num_processes}"
            most = self.process_id + 1 if self.num_processes is None else self.num_processes
            if not 0 <= self.process_id < most:
                raise UsageError(f"--process-id must be at least 0{below}; got {self.process_id}")

    @contextlib.contextmanager
    def joined(
        self, *, debug: bool, say: Callable[[str], None] = lambda _: None
    ) -> "Iterator[Group | None]":
        """Compute together with the others inside; None: there are no others.

        An exception inside ends this process and, with its message, the others.

        Args:
            debug: Show its traceback.
            say: Takes a line about what this process waits for, where that is long.
        """
        self.check()
        if not self.distributed:
            yield None
            return
        report = functools.partial(_report, debug=debug)
        try:
            _keep_stdout()
            interrupts.work_begins()
            import jax

            from jaxinfer.distributed import watched
            from jaxinfer.distributed.last_words import spoken_on_abort

            with spoken_on_abort():
                self._connect(say)
                with watched(self.heartbeat_timeout or _HEARTBEAT_S, report=report) as group:
                    yield group
                jax.distributed.shutdown()
        except BaseException as error:  # before the processes have met, or after they have parted
            from jaxinfer.distributed.watching import end

            end(error, report)

    def _connect(self, say: Callable[[str], None]) -> None:
        from jaxinfer.distributed.start import initialize

        initialize(
            coordinator=self.coordinator,
            num_processes=self.num_processes,
            process_id=self.process_id,
            initialization_timeout_s=self.initialization_timeout or _INITIALIZATION_S,
            heartbeat_timeout_s=self.heartbeat_timeout or _HEARTBEAT_S,
            say=say,
        )


def _keep_stdout() -> None:
    """Send what is not ours to standard error: Gloo greets on standard output."""
    sys.stdout.flush()
    ours = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = open(  # noqa: SIM115  (open until the process ends)
        ours, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors,
        buffering=1 if sys.stdout.isatty() else -1,
    )  # fmt: skip


def _report(error: BaseException, *, debug: bool) -> tuple[int, str]:
    """As `main` does, which this error does not reach; and what the others are told."""
    from jaxinfer.distributed.watching import meaning

    error = meaning(error)
    if isinstance(error, BrokenPipeError):
        return errors.FAILED, errors.message(error)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    return errors.report(error, debug=debug), errors.message(error)
