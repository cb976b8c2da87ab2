"""These tests need eight CPU devices, a number that JAX fixes when it starts.

`tests/sharding/test_eight_devices.py` runs them in processes of their own. By hand:

export XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu
pytest tests/sharding/eight_devices
"""

import os

import pytest

from tests.ops.cases import quick_compilation

if "--xla_force_host_platform_device_count=8" not in os.environ.get("XLA_FLAGS", ""):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def quickly():
    """Most of the time is compilation, and one device and several are compiled alike.

    With all of XLA's optimisations, answers are compared in `test_two_processes.py` and
    `test_processes.py`.
    """
    with quick_compilation():
        yield
