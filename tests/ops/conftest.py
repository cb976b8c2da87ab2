"""Where ops run in tests: on this machine, or as if on a Hopper GPU."""

import jax
import pytest

from jaxinfer.pallas_kernels.device import H100, current_device, use_device
from tests.ops.hopper import Hopper


@pytest.fixture(autouse=True)
def exact_float32():
    """Float32 products in float32: GPUs round their operands to TF32 by default."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def h100():
    """Plan as if on an H100; nothing can run there, but calls can be traced and lowered."""
    with use_device(H100):
        yield H100


@pytest.fixture
def interpreter() -> Hopper:
    """A Hopper GPU simulated on the CPU, with race detection."""
    if jax.default_backend() != "cpu":
        pytest.skip("the interpreter runs on CPUs: set JAX_PLATFORMS=cpu")
    return Hopper(interpreted=True)


@pytest.fixture
def hopper_gpu() -> Hopper:
    """A real Hopper GPU; its tests carry the `gpu` mark."""
    if not current_device().is_hopper:
        pytest.skip(f"needs compute capability 9.0; this is {current_device().name}")
    return Hopper(interpreted=False)


@pytest.fixture(params=["interpreter", pytest.param("hopper_gpu", marks=pytest.mark.gpu)])
def hopper(request) -> Hopper:
    """Both in turn: a kernel's small cases run in the interpreter and on the GPU."""
    return request.getfixturevalue(request.param)
