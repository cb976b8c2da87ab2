"""A model divided over the devices of two processes, which run the same program."""

import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxinfer.models.checkpoint.orbax import save_orbax
from jaxinfer.models.parallel.axes import divided_axis
from jaxinfer.models.parallel.parallel import Parallel
from jaxinfer.models.parallel.shards import source
from jaxinfer.sharding.mesh import AXES
from tests.models.families import CONFIGS, random_model, random_weights
from tests.models.huggingface_files import write_directory
from tests.paths import REPOSITORY


@pytest.mark.slow
def test_both_processes_find_the_answers_of_one_device(tmp_path):
    """And read from files what their own devices need, no more."""
    write_directory(tmp_path / "safetensors", "llama")
    save_orbax(tmp_path / "orbax", random_model("llama"))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)}
    script = REPOSITORY / "tests" / "sharding" / "two_processes.py"
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(number), address, str(tmp_path)], cwd=REPOSITORY,
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
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
    assert first["said"] == second["said"] == "of process 0"
    for process, found in enumerate((first, second)):
        few, own = found["refused"]
        assert "has 2 devices, but the processes of this program have 4" in few
        assert f"mesh has no device of process {1 - process}; every one of the 2 processes" in own
    for process, found in enumerate((first, second)):
        for name, got in found["shares"].items():
            # Along `seq` both have all parts, on two devices each: they are read once.
            mine = range(2 * process, 2 * process + 2) if name.endswith("tensor=4") else range(2)
            want = needed(mine, of=4 if name.endswith("tensor=4") else 2)
            assert got == pytest.approx(want, rel=1e-9), (name, process)


def needed(devices: range, *, of: int) -> tuple[float, float]:
    """What devices have of a model: the share of its numbers, and a sum of what is divided."""
    config = CONFIGS["llama"]
    mesh = Mesh(np.array(jax.devices()[:1] * of).reshape(1, 1, of), AXES)
    parallel = Parallel(config, mesh)
    read, whole, total = 0, 0, 0.0
    for name, weight in random_weights("llama").items():
        axis = divided_axis(name)
        whole += weight.size
        if axis is None:
            read += weight.size
            continue
        index = source(name, parallel)[list(devices)]
        part = np.take(weight, index[index >= 0], axis=axis)
        read += part.size
        total += float(np.abs(part.astype(np.float64)).sum())
    return read / whole, total
