"""Connect this process with the others."""

import concurrent.futures
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

import jax

# JAX's own limits come after ours, which end in a line instead of a stack trace.
_LATER_S = 30
_PATIENCE_S = 5.0  # before a process says what it waits for


class UnreachableError(RuntimeError):
    """The processes did not find each other."""


def initialize(
    *,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    initialization_timeout_s: int,
    heartbeat_timeout_s: int,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """`jax.distributed.initialize`, with a time limit that ends in an exception.

    Args:
        coordinator: Address and port of process 0; None: from the launcher.
        num_processes: In all; None: from the launcher.
        process_id: Of this one; None: from the launcher.
        initialization_timeout_s: All processes have to come within so long.
        heartbeat_timeout_s: JAX takes a process for dead after twice as long; `Watch` after this.
        say: Takes a line about what this process waits for, where that is long.

    Raises:
        ValueError: no launcher that JAX knows, or numbers that do not fit together.
        UnreachableError: process 0 cannot listen, its name is not known, or it was not reached in
            time by all. JAX still tries, so the process has to be ended.
        RuntimeError: JAX has been used already.
    """
    if process_id == 0 and coordinator is not None:
        _check_port(coordinator)
    # For programs that save their state it catches SIGTERM, so that a job could not be ended by it.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        # Process 0 alone writes it, and hosts may have folders of their own: some processes would
        # wait for one that compiles, or for tuning that another did not do.
        jax.config.update("jax_compilation_cache_dir", "")
    done: concurrent.futures.Future[None] = concurrent.futures.Future()

    def connect() -> None:
        try:
            if coordinator is not None:
                _check_name(coordinator)
            jax.distributed.initialize(
                coordinator, num_processes, process_id,
                initialization_timeout=initialization_timeout_s + _LATER_S,
                heartbeat_timeout_seconds=2 * heartbeat_timeout_s + _LATER_S,
            )  # fmt: skip
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)

    # In a thread: Ctrl-C is not noticed inside of the call.
    threading.Thread(target=connect, name="connect", daemon=True).start()
    try:
        early = min(_PATIENCE_S, initialization_timeout_s)
        finished, _ = concurrent.futures.wait([done], timeout=early)
        if not finished and early < initialization_timeout_s:
            waits = _waits_for(coordinator, num_processes, process_id)
            say(f"waiting for {waits}, at most {initialization_timeout_s} s …")
        done.result(timeout=initialization_timeout_s - early)
    except TimeoutError:
        raise UnreachableError(
            _too_late(coordinator, num_processes, process_id, initialization_timeout_s)
        ) from None
    except ValueError as error:
        if "defined" not in str(error):
            raise
        raise ValueError(
            "no launcher that JAX knows has started this process (Slurm, Open MPI, Kubernetes); "
            f"give {_missing(coordinator, num_processes, process_id)}"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        if "start RPC server" not in str(error):
            raise
        raise UnreachableError(_port_is_taken(coordinator)) from error


def _check_port(coordinator: str) -> None:
    """Whether process 0 can listen where the others will look for it.

    JAX does the same a moment later, but jaxlib 0.11.2 ends some processes by a segmentation fault
    where it cannot.
    """
    port = int(coordinator.rpartition(":")[2])
    family, host = (socket.AF_INET6, "::") if socket.has_dualstack_ipv6() else (socket.AF_INET, "")
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UnreachableError(_port_is_taken(coordinator)) from error


def _check_name(coordinator: str) -> None:
    """Whether process 0 can be found at all; JAX would try until the time limit."""
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return  # a pod has a name only once it runs
    host = coordinator.rpartition(":")[0].strip("[]")
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise UnreachableError(
            f"the coordinator's name {host!r} cannot be resolved: {error.strerror}"
        ) from error


def _missing(coordinator: str | None, count: int | None, number: int | None) -> str:
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    given = {"--coordinator": coordinator, "--num-processes": count, "--process-id": number}
    *others, last = [option for option, value in given.items() if value is None]
    return f"{', '.join(others)} and {last}" if others else last


def _waits_for(coordinator: str | None, count: int | None, number: int | None) -> str:
    everyone = "all processes" if count is None else f"all {count} processes"
    if coordinator is None:
        return everyone
    if number == 0:
        return f"{everyone} at {coordinator}, which is this one"
    return everyone if _answers(coordinator) else f"process 0 at {coordinator}"


def _answers(coordinator: str) -> bool:
    host, _, port = coordinator.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=1):
            return True
    except OSError:
        return False


def _port_is_taken(coordinator: str | None) -> str:
    return (
        "process 0 cannot listen on the coordinator's port; another program may have it, "
        f"perhaps a process 0 of its own{'' if coordinator is None else f' ({coordinator})'}"
    )


def _too_late(coordinator: str | None, count: Any, number: Any, seconds: int) -> str:
    where = "the coordinator" if coordinator is None else f"the coordinator {coordinator}"
    of = "all processes" if count is None else f"all {count} processes"
    if number == 0:
        return f"not {of} have reached {where}, which is this process, within {seconds} s"
    if coordinator is not None and _answers(coordinator):
        told = "" if count is None else f"; or process 0 was told another number than {count}"
        return f"{where} was reached, but not by {of} within {seconds} s{told}"
    return f"{where} was not reached within {seconds} s, or not by {of}"
