"""Threads that end this process when another one has failed or died.

A process that waits in a collective for one that is gone may wait for ever: NCCL does. JAX's own
heartbeats end it then, but with a stack trace and without saying who was lost or why. So every
process counts up a number of its own in the coordinator's store, says there why it fails, and reads
what the others say.
"""

import contextlib
import os
import threading
import time

from jaxinfer.distributed import last_words
from jaxinfer.distributed.store import Store

FAILED = 1
UNREACHABLE = "process 0, the coordinator, cannot be reached any more"
_BEATS, _REASONS = "jaxinfer/beats", "jaxinfer/reasons"
_KNOWING, _GONE = "jaxinfer/knowing", "jaxinfer/gone"
# Intervals: how long a process waits until all know, process 0 in particular, and in all.
_READING, _READING_FIRST, _PARTING = 2.5, 3.5, 5
_LAST_S = 0.25  # from the last call of the store to the end of a process


class Watch:
    """Beats, and listens to the beats of others, until it is stopped."""

    def __init__(self, store: Store, index: int, count: int, timeout_s: float):
        """Begin.

        Args:
            store: That all processes share.
            index: Of this process.
            count: Of processes.
            timeout_s: A process whose number stands still for so long is lost.
        """
        self._store, self._index, self._count, self._timeout_s = store, index, count, timeout_s
        self.interval_s = min(1.0, timeout_s / 10)
        self._stopped, self._silenced = threading.Event(), threading.Event()
        self._answered = time.monotonic()  # when the store did so last
        self._threads = [
            threading.Thread(target=run, name=name, daemon=True)
            for run, name in ((self._run, "watch"), (self._watch_coordinator, "watch-coordinator"))
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads, before the coordinator is disconnected."""
        beating, guarding = self._threads
        self._stopped.set()
        beating.join()  # perhaps within a call of the store, which is guarded until then
        self._silenced.set()
        guarding.join()

    def tell(self, reason: str) -> None:
        """Say why this process fails, and give the others time to read it, at most half the limit.

        Whoever cannot be told in time will find this process silent.
        """
        self._part(reason)

    def _part(self, reason: str | None) -> None:
        last_words.hush()
        # Calls of the store have no time limit, and process 0, where it is, may stand still.
        parting = threading.Thread(target=self._say, args=(reason,), name="part", daemon=True)
        parting.start()
        parting.join(_PARTING * self.interval_s)

    def _say(self, reason: str | None) -> None:
        """Leave when all know why, process 0 last.

        With process 0 ends the coordinator, at which JAX aborts whoever is still there; with any,
        connections, of which others would hear before they hear the reason.
        """
        is_first = self._index == 0
        with contextlib.suppress(Exception):  # the process ends by an error that says more
            if reason is not None:
                self._store.put(f"{_REASONS}/{self._index}", reason)
            self._store.put(f"{_KNOWING}/{self._index}", "yes")
            end = time.monotonic() + (_READING_FIRST if is_first else _READING) * self.interval_s
            while len(self._store.listing(_KNOWING)) < self._count and time.monotonic() < end:
                time.sleep(self.interval_s / 10)
            self._store.put(f"{_GONE}/{self._index}", "yes")
            if is_first:
                # One that is lost does not know, and is not waited for.
                while self._store.listing(_KNOWING).keys() - self._store.listing(_GONE).keys():
                    time.sleep(self.interval_s / 10)
                time.sleep(_LAST_S)

    def _run(self) -> None:
        beats = 0
        heard: dict[int, tuple[str | None, float]] = {}
        while not self._stopped.wait(self.interval_s if beats else 0):
            beats += 1
            try:
                self._store.put(f"{_BEATS}/{self._index}", str(beats))
                reasons, numbers = self._store.listing(_REASONS), self._store.listing(_BEATS)
            except Exception:
                if not self._stopped.is_set():
                    self._leave(UNREACHABLE)
                return
            self._answered = time.monotonic()
            others = [number for number in range(self._count) if number != self._index]
            now = time.monotonic()
            for number in others:
                if (reason := reasons.get(str(number))) is not None:
                    self._leave(f"process {number} has failed: {reason}")
                    return
                beat = numbers.get(str(number))
                known, since = heard.get(number, (None, now))
                heard[number] = (beat, now if beat != known else since)
                if now - heard[number][1] > self._timeout_s:
                    self._leave(_silent(number, self._timeout_s))
                    return

    def _watch_coordinator(self) -> None:
        """Leave if process 0 is there but stands still, or if what it sends is lost.

        Calls of the store have no time limit of their own, and then wait in `_run`.
        """
        while not self._silenced.wait(self.interval_s):
            if time.monotonic() - self._answered > self._timeout_s:
                self._leave(_silent(0, self._timeout_s))
                return

    def _leave(self, message: str) -> None:
        last_words.claim()
        with contextlib.suppress(OSError):  # whoever read it may have gone
            os.write(2, f"error: {message}\n".encode())
        self._part(None)
        # Whoever waits in a collective cannot be reached by an exception.
        os._exit(FAILED)


def _silent(number: int, seconds: float) -> str:
    return (
        f"process {number} has not answered for {seconds:g} s; it has died, or the network is down"
    )
