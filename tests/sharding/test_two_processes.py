"""A model divided over the devices of two processes, which run the same program."""

import json
import os
import socket
import subprocess
import sys

import pytest

from tests.paths import REPOSITORY


@pytest.mark.slow
def test_both_processes_find_the_answers_of_one_device():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)}
    script = REPOSITORY / "tests" / "sharding" / "two_processes.py"
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(number), address], cwd=REPOSITORY, env=environment,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, said, strict=True):
        assert process.returncode == 0, errors[-4000:]
    first, second = (json.loads(output.splitlines()[-1]) for output, _ in said)
    assert first["devices"] == second["devices"] == 4
    assert first["answers"] == second["answers"] == first["alone"]
    assert first["least"] == second["least"] == 7
    assert "has 2 devices, but the processes of this program have 4" in first["error"]
