"""Run `jaxinfer generate --distributed` in two processes on the loopback."""

import contextlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence

from tests.cli.command import REPOSITORY, command
from tests.sharding.launchers import Launcher, by_hand

LONGEST_S = 120
# Gloo's threads greet at once, word by word, so that lines may hold parts of several greetings.
_GREETING = re.compile(
    r"(\[Gloo\] Rank |\d+| is connected to |"
    r" ?peer ranks\. |Expected number of connected peer ranks is : )+"
)


def free_address() -> str:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def environment(devices: int) -> dict[str, str]:
    """That of a process with so many CPU devices, which keeps nothing that it compiles."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": "",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }


def one(
    address: str, number: int, devices: int, *arguments: str, launcher: Launcher = by_hand
) -> subprocess.Popen[str]:
    """Start one of two processes."""
    options, variables = launcher(address, number)
    return subprocess.Popen(
        command("generate", *arguments, "--distributed", *options),
        cwd=REPOSITORY, env=environment(devices) | variables, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@contextlib.contextmanager
def two(
    *arguments: str,
    devices: int = 1,
    follower: Sequence[str] | None = None,
    launcher: Launcher = by_hand,
) -> Iterator[list[subprocess.Popen[str]]]:
    """Two processes with the same arguments, or others for the second; they end with the block."""
    address = free_address()
    running = [
        one(
            address, number, devices,
            *(arguments if not number or follower is None else follower), launcher=launcher,
        )
        for number in range(2)
    ]  # fmt: skip
    with ended(running):
        yield running


@contextlib.contextmanager
def waiting(kind: str = "program") -> Iterator[list[subprocess.Popen[str]]]:
    """Two that have found each other: process 0 is busy, process 1 waits for what it will say.

    Args:
        kind: As `waiting_process.py` has it.
    """
    address = free_address()
    script = str(REPOSITORY / "tests" / "sharding" / "waiting_process.py")
    running = [
        subprocess.Popen(
            [sys.executable, script, str(number), address, kind], cwd=REPOSITORY, text=True,
            env=environment(1) | {"PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number in range(2)
    ]  # fmt: skip
    with ended(running):
        for process in running:
            assert process.stdout is not None
            assert process.stdout.readline() == "joined\n"
        yield running


@contextlib.contextmanager
def ended(running: list[subprocess.Popen[str]]) -> Iterator[None]:
    """No process outlives the block."""
    try:
        yield
    finally:
        for process in running:
            process.kill()  # also a stopped one
            process.wait()
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()


def ends(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, output and errors, once it has ended; Gloo's greetings left out."""
    output, errors = process.communicate(timeout=LONGEST_S)
    lines = (line for line in errors.splitlines() if line and not _GREETING.fullmatch(line))
    return process.returncode, output, "\n".join(lines)
