"""Run `eight_devices` in processes that have eight CPU devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import REPOSITORY

FOLDER = Path(__file__).parent / "eight_devices"
FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))
FLAG = "--xla_force_host_platform_device_count=8"


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_file(file: str):
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FLAG}",
        "JAX_PLATFORMS": "cpu",
    }
    # A worker of pytest-xdist names itself in the environment; its child is none.
    environment = {k: v for k, v in environment.items() if not k.startswith("PYTEST_XDIST")}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
               str(FOLDER / file)]  # fmt: skip
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
    assert " passed" in done.stdout
