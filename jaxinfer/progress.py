"""Progress of downloads, loading, compilation and evaluation: bars on a terminal, else lines."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import IO, Literal, Protocol, cast, runtime_checkable

from jaxinfer.models.progress import Progress

Mode = Literal["auto", "plain", "off"]


@runtime_checkable
class Stream(Protocol):
    """What is needed of a text stream; notebooks and loggers replace `sys.stderr` freely."""

    def write(self, text: str, /) -> object:
        """Write text."""
        ...

    def flush(self) -> object:
        """Write it now."""
        ...

    def isatty(self) -> bool:
        """Whether a person watches."""
        ...


_LINE_EVERY_S = 2.0


class Reporter:
    """Shows how far things are, on standard error by default.

    On a terminal a bar is drawn and removed when the task ends. Elsewhere (files, pipes, logs)
    a line is written at most every two seconds and one at the end, without control characters.

    >>> reporter = Reporter(sys.stdout, mode="plain")
    >>> with reporter.task("load", unit="weights") as progress:
    ...     progress("embed", 1, 1)  # doctest: +ELLIPSIS
    load: 1 weight in ...
    """

    def __init__(self, stream: Stream | None = None, *, mode: str = "auto"):
        """Choose where and how to report.

        Args:
            stream: Default: standard error; where that is closed, nothing is shown.
            mode: `"auto"`, `"plain"` (lines even on a terminal) or `"off"`.

        Raises:
            ValueError: an unknown mode.
        """
        if mode not in ("auto", "plain", "off"):
            raise ValueError(f"progress must be auto, plain or off; got {mode!r}")
        self.stream: Stream = sys.stderr if stream is None else stream
        self.enabled = mode != "off" and self.stream is not None
        self.draws = self.enabled and mode == "auto" and self.stream.isatty()

    @contextlib.contextmanager
    def task(
        self,
        title: str,
        *,
        unit: str = "",
        quiet: bool = False,
        foresee: bool = False,
        late: bool = False,
    ) -> Iterator[Progress]:
        """Report one task; call the result with (name, done, total).

        Args:
            title: A word or two.
            unit: What is counted; `"bytes"` are shown in MB.
            quiet: Write no line if the task ends within two seconds (not on a terminal).
            foresee: Show how long the rest will take, if units take equally long.
            late: Show nothing before the first call, and nothing at all if there is none.
        """
        if not self.enabled:
            yield _ignore
        elif self.draws:
            with self._bar(title, unit, foresee, late) as progress:
                yield progress
        else:
            lines = _Lines(self.stream, title, unit, foresee)
            yield lines
            if lines.called or not late:
                lines.finish(quiet=quiet)

    def note(self, text: str) -> None:
        """Write a line, unless reporting is off."""
        if self.enabled:
            print(text, file=self.stream, flush=True)

    @contextlib.contextmanager
    def _bar(self, title: str, unit: str, foresee: bool, late: bool) -> Iterator[Progress]:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            ProgressColumn,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as Bars

        counts: list[ProgressColumn] = [MofNCompleteColumn(), TextColumn(unit)]
        if unit == "bytes":
            counts = [DownloadColumn(), TransferSpeedColumn()]
        elif not unit:
            counts = []
        counts.append(TimeElapsedColumn())
        if foresee:
            counts += [TimeRemainingColumn(), TextColumn("left")]
        columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), *counts]
        console = Console(file=cast("IO[str]", self.stream))
        bars = Bars(*columns, console=console, transient=True)
        with contextlib.ExitStack() as shown:
            task = bars.add_task(title, total=None)
            if not late:
                shown.enter_context(bars)

            def progress(name: str, done: int, total: int) -> None:
                if not bars.live.is_started:
                    shown.enter_context(bars)
                bars.update(task, completed=done, total=total or None)

            yield progress


class _Lines:
    def __init__(self, stream: Stream, title: str, unit: str, foresee: bool):
        self._stream, self._title, self._unit = stream, title, unit
        self._foresee = foresee
        self._start = self._last = time.monotonic()
        self._done = 0
        self.called = False

    def __call__(self, name: str, done: int, total: int) -> None:
        self._done, self.called = done, True
        now = time.monotonic()
        if now - self._last < _LINE_EVERY_S or (total and done >= total):
            return
        self._last = now
        share = f" ({100 * done // total} %)" if total else ""
        left = ""
        if self._foresee and total and done:
            left = f", about {(now - self._start) / done * (total - done):.0f} s left"
        self._print(f"{self._amount(done, total)}{share}{left}")

    def finish(self, *, quiet: bool) -> None:
        seconds = time.monotonic() - self._start
        if quiet and seconds < _LINE_EVERY_S:
            return
        amount = f"{self._amount(self._done)} in " if self._done else ""
        self._print(f"{amount}{seconds:.1f} s")

    def _amount(self, done: int, total: int = 0) -> str:
        def text(count: int) -> str:
            return f"{count / 1e6:.1f}" if self._unit == "bytes" else f"{count}"

        unit = "MB" if self._unit == "bytes" else self._unit
        if (total or done) == 1:
            unit = unit.removesuffix("s")
        return f"{text(done)}{f'/{text(total)}' if total else ''} {unit}".rstrip()

    def _print(self, text: str) -> None:
        print(f"{self._title}: {text}", file=self._stream, flush=True)


def _ignore(name: str, done: int, total: int) -> None:
    del name, done, total


class CompileWatch:
    """Counts what XLA compiles in this process, and for how long, while it is entered.

    Attributes:
        count: Programs compiled, or loaded from JAX's compilation cache.
        seconds: Time spent on it.
    """

    def __init__(self) -> None:
        """Watch from `with` on."""
        self.count, self.seconds = 0, 0.0

    def __enter__(self) -> "CompileWatch":
        from jax import monitoring

        monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        from jax import monitoring

        monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("/backend_compile_duration"):
            self.count += 1
            self.seconds += duration_secs
