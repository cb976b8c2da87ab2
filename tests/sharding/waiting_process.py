"""One of two processes that wait for each other between steps; run by `test_processes.py`.

Arguments: its number, the address of the first, and whether it is a `program` that calls JAX itself
or a `command` of ours. Says `joined` when it has found the other; SIGUSR1 is an error.
"""

import contextlib
import signal
import sys
import time
from collections.abc import Iterator

import jax

from jaxinfer.cli.processes import Processes
from jaxinfer.distributed import watched
from jaxinfer.distributed.group import Group

LIMIT_S = 3


@contextlib.contextmanager
def joined(number: int, address: str, kind: str) -> Iterator[Group]:
    if kind == "program":
        jax.distributed.initialize(address, num_processes=2, process_id=number)
        with watched(LIMIT_S) as group:
            yield group
        return
    processes = Processes(
        distributed=True, coordinator=address, num_processes=2, process_id=number,
        initialization_timeout=60, heartbeat_timeout=LIMIT_S,
    )  # fmt: skip
    with processes.joined(debug=False) as group:
        assert group is not None
        yield group


def fail(*_: object) -> None:
    raise RuntimeError("the disk is full")


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, fail)
    with joined(int(sys.argv[1]), *sys.argv[2:]) as group:
        print("joined", flush=True)
        if group.is_first:
            time.sleep(600)  # a download, say
        group.share("a plan")
