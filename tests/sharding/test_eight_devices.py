"""Run `eight_devices` in processes that have eight CPU devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import REPOSITORY

FOLDER = Path(__file__).parent / "eight_devices"
# A process takes seconds to start: one for engines, one for attention, one for the rest.
FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))
ENGINES = [name for name in FILES if name.startswith("test_engine")]
ATTENTION = ["test_exchange.py", "test_ring_attention.py", "test_ulysses.py", "test_whole.py"]
GROUPS = [ENGINES, ATTENTION, [name for name in FILES if name not in ENGINES + ATTENTION]]
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
