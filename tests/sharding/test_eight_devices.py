"""Run `eight_devices` in processes that have eight CPU devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import REPOSITORY

FOLDER = Path(__file__).parent / "eight_devices"
# A process takes seconds to start: one for each of the files that take longest, two for the rest.
LONGEST = {"test_engine.py", "test_engine_sequence.py", "test_models.py", "test_ring_attention.py"}
OTHERS = sorted({path.name for path in FOLDER.glob("test_*.py")} - LONGEST)
GROUPS = [[name] for name in sorted(LONGEST)] + [OTHERS[::2], OTHERS[1::2]]
FLAG = "--xla_force_host_platform_device_count=8"


@pytest.mark.slow
@pytest.mark.parametrize("files", GROUPS, ids=" ".join)
def test_files(files: list[str]):
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FLAG}",
        "JAX_PLATFORMS": "cpu",
    }
    # A worker of pytest-xdist names itself in the environment; its child is none.
    environment = {k: v for k, v in environment.items() if not k.startswith("PYTEST_XDIST")}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
               *(str(FOLDER / file) for file in files)]  # fmt: skip
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
    assert " passed" in done.stdout
