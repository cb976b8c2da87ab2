"""These tests need eight CPU devices, a number that JAX fixes when it starts.

`tests/sharding/test_eight_devices.py` runs them in processes of their own. By hand:

export XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu
pytest tests/sharding/eight_devices
"""

import os

if "--xla_force_host_platform_device_count=8" not in os.environ.get("XLA_FLAGS", ""):
    collect_ignore_glob = ["test_*.py"]
