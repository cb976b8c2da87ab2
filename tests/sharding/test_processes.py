"""`jaxinfer generate --distributed` in two processes: their answers, and how they end."""

import json
import signal
import socket
import time

import pytest

from tests.cli.command import run, write_tiny_model
from tests.models import real
from tests.paths import model_path, needs_model
from tests.sharding.launchers import openmpi, slurm
from tests.sharding.processes import ended, ends, environment, free_address, one, two, waiting

PROMPTS = ("Hello there", "And")
LENGTH = ("--raw", "--ignore-eos", "--max-tokens")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """9 query and 3 KV heads, which neither 2 nor 8 devices divide; one layer, compiled often."""
    folder = tmp_path_factory.mktemp("models") / "nine"
    sizes = {"num_layers": 1, "num_heads": 9, "num_kv_heads": 3, "max_position_embeddings": 4096}
    return str(write_tiny_model(folder, **sizes))


@pytest.fixture(scope="module")
def alone(model) -> list[list[int]]:
    """Tokens that one process finds on one device."""
    done = run("generate", "--model", model, *LENGTH, "20", "--json", *PROMPTS,
               environment=environment(1))  # fmt: skip
    assert done.returncode == 0, done.stderr
    return tokens(done.stdout)


@pytest.fixture
def quickly(monkeypatch):
    """Processes leave XLA's optimisations out, where no numbers are compared."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


def tokens(output: str) -> list[list[int]]:
    return [json.loads(line)["token_ids"] for line in output.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "launcher"), [((), slurm), (("--mesh", "seq=4,tensor=2"), openmpi)],
    ids=("tensor-slurm", "seq-openmpi"),
)  # fmt: skip
def test_greedy_tokens_are_those_of_one_process(model, alone, mesh, launcher):
    """Over eight devices; the second process has neither prompts nor options."""
    with two(
        "--model", model, *LENGTH, "20", "--json", *mesh, *PROMPTS,
        devices=4, follower=["--model", model], launcher=launcher,
    ) as (first, second):  # fmt: skip
        code, output, errors = ends(first)
        assert code == 0, errors
        assert tokens(output) == alone
        assert ends(second) == (0, "", "")


@pytest.mark.slow
def test_the_first_process_streams(model):
    """A sampled answer over two devices: all processes draw the same random numbers."""
    arguments = ("--model", model, *LENGTH, "30", "--temperature", "1", "--seed", "3", PROMPTS[0])
    with two(*arguments, follower=["--model", model]) as (first, second):
        code, output, errors = ends(first)
        assert code == 0, errors
        assert "30 tokens" in errors
        assert output == run("generate", *arguments, environment=environment(1)).stdout
        assert ends(second) == (0, "", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "how", "code", "message"),
    [
        # As if it was killed, for the others.
        (1, signal.SIGTERM, 1, "error: the connection to another process was lost"),
        # The only case that Gloo does not notice; with NCCL all are like it.
        (1, signal.SIGSTOP, 1, "error: process 1 has not answered for 5 s"),
        (0, signal.SIGKILL, 1, "error: "),
        (0, signal.SIGINT, 1, "error: process 0 has failed: interrupted"),
        (1, signal.SIGINT, 1, "error: process 1 has failed: interrupted"),
    ],
)
def test_a_stream_that_loses_a_process_ends(quickly, model, which, how, code, message):
    """The text has begun to come; the other process ends in time, with one line of ours."""
    with two("--model", model, *LENGTH, "4000", "Hello", "--heartbeat-timeout", "5") as running:
        assert running[0].stdout is not None
        assert running[0].stdout.read(1)
        running[which].send_signal(how)
        start = time.monotonic()
        got, _, errors = ends(running[1 - which])
        assert time.monotonic() - start < 30
        assert got == code, errors
        said = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert len(said) == 1, errors
        assert said[0].startswith(message)
        if (which, how) != (0, signal.SIGKILL):  # the coordinator goes last where it can
            assert "Check failure" not in errors
        if how == signal.SIGINT:
            code, _, errors = ends(running[which])
            assert code == 130
            assert errors.splitlines()[-1] == "error: interrupted"


@pytest.mark.slow
def test_a_prompt_that_is_shared_loses_a_process(quickly, model):
    """Along `seq` devices wait for each other's keys in every layer."""
    mesh = ("--mesh", "seq=2", "--heartbeat-timeout", "5")
    with two("--model", model, *LENGTH, "4000", "Hello", *mesh) as (first, second):
        assert first.stdout is not None
        assert first.stdout.read(1)
        second.kill()
        start = time.monotonic()
        code, _, errors = ends(first)
        assert time.monotonic() - start < 30
        assert code == 1, errors
        assert "error: the connection to another process was lost" in errors


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("which", [0, 1])
def test_a_process_that_is_lost_between_steps(which, how):
    """Nobody is in a collective, where a connection would break: only the watch can tell.

    The program called `jax.distributed.initialize` itself.
    """
    with waiting() as running:
        running[which].send_signal(how)
        start = time.monotonic()
        code, _, errors = ends(running[1 - which])
        assert time.monotonic() - start < 20  # for a limit of 3 s
        assert code == 1, errors
        said = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert len(said) == 1, errors
        if (which, how) == (0, signal.SIGKILL):  # with it went the coordinator
            assert "process 0" in said[0]
        else:
            assert f"process {which} has not answered for 3 s" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "how", "code", "message"),
    [
        ("command", signal.SIGINT, 130, "error: interrupted"),
        ("command", signal.SIGUSR1, 1, "error: the disk is full"),
        ("program", signal.SIGUSR1, 1, "RuntimeError: the disk is full"),
    ],
)
def test_a_process_that_cannot_tell_the_first_ends_nevertheless(kind, how, code, message):
    """Process 0, by which processes tell each other, stands still: its store never answers."""
    with waiting(kind) as (first, second):
        first.send_signal(signal.SIGSTOP)
        second.send_signal(how)
        start = time.monotonic()
        got, _, errors = ends(second)
        assert time.monotonic() - start < 15  # for a limit of 3 s; JAX aborts it after 30 s or more
        assert got == code, errors
        assert errors.splitlines()[-1] == message
        if kind == "command":
            assert errors == message


@pytest.mark.slow
def test_an_error_of_one_process_is_the_error_of_all(quickly, model, tmp_path):
    other = str(write_tiny_model(tmp_path / "other", num_heads=4, num_kv_heads=2))
    with two("--model", model, "Hello", follower=["--model", other]) as (first, second):
        code, _, errors = ends(second)
        assert code == 2
        assert errors.startswith("error: the model differs: process 0 has DecoderConfig(")
        assert len(errors.splitlines()) == 1
        code, _, errors = ends(first)
        assert code == 1
        assert "error: process 1 has failed: the model differs" in errors
        assert "Check failure" not in errors


@pytest.mark.slow
def test_processes_that_do_not_come_are_not_waited_for(model):
    """Two that wait for others, each at an address of its own: at the same time, it takes long."""
    expected = [
        ("all 2 processes",
         "error: not all 2 processes have reached the coordinator {}, which is this process,"),
        ("process 0",
         "error: the coordinator {} was not reached within 6 s, or not by all 2 processes"),
    ]  # fmt: skip
    addresses = [free_address() for _ in expected]
    running = [
        one(address, number, 1, "--model", model, "Hello", "--initialization-timeout", "6")
        for number, address in enumerate(addresses)
    ]
    with ended(running):
        for process, address, (whom, message) in zip(running, addresses, expected, strict=True):
            code, output, errors = ends(process)
            assert (code, output) == (1, "")
            waits, error = errors.splitlines()
            assert waits.startswith(f"waiting for {whom} at ")
            assert error.startswith(message.format(address))


@pytest.mark.slow
def test_a_coordinator_whose_name_nobody_knows(model):
    process = one("no-such-host.invalid:1234", 1, 1, "--model", model, "Hello")
    with ended([process]):
        code, output, errors = ends(process)
    assert (code, output) == (1, "")
    assert errors.startswith("error: the coordinator's name 'no-such-host.invalid' cannot be")
    assert len(errors.splitlines()) == 1


@pytest.mark.slow
def test_a_port_that_another_program_has(model):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        process = one(address, 0, 1, "--model", model, "Hello", "--initialization-timeout", "20")
        with ended([process]):
            code, output, errors = ends(process)
    assert (code, output) == (1, "")
    said = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, errors
    assert said[0].startswith("error: process 0 cannot listen on the coordinator's port")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--process-id", "1"), "--process-id needs --distributed"),
        (("--heartbeat-timeout", "9"), "--heartbeat-timeout needs --distributed"),
        (("--distributed", "--num-processes", "2", "--process-id", "2"),
         "--process-id must be at least 0 and below 2; got 2"),
        (("--distributed", "--coordinator", "host"), "--coordinator must be HOST:PORT; got 'host'"),
        (("--distributed", "--coordinator", "host:99999"), "--coordinator must be HOST:PORT"),
        (("--distributed", "--heartbeat-timeout", "0"), "--heartbeat-timeout must be positive"),
        (("--distributed",), "give --coordinator, --num-processes and --process-id"),
        (("--distributed", "--coordinator", "localhost:9", "--num-processes", "2"),
         "(Slurm, Open MPI, Kubernetes); give --process-id"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_together(arguments, message):
    done = run("generate", "Hello", *arguments, environment=environment(1))
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.model
@needs_model("smollm2")
def test_a_real_model_on_two_processes():
    """SmolLM2: every process reads its own parts from the file.

    It says what an independent implementation said, after the same prompt.
    """
    want = real.excerpt()["gen_ids"][len(real.excerpt()["prompt_ids"]) :].tolist()
    arguments = ("--model", str(model_path("smollm2")), "--raw", "The capital of France is",
                 "--max-tokens", "12", "--json", "--max-model-len", "128")  # fmt: skip
    with two(*arguments) as (first, second):
        code, output, errors = ends(first)
        assert code == 0, errors
        assert tokens(output) == [want[:12]]
        assert ends(second)[0] == 0
