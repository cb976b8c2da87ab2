"""Descriptions of devices, real, unknown and injected."""

import dataclasses
import types

import jax
import pytest

from jaxinfer.pallas_kernels.device import CPU, H100, H200, current_device, from_jax, use_device


def fake(**attributes):
    """A JAX device, as far as `from_jax` looks."""
    described = {"platform": "gpu", "device_kind": "NVIDIA L4", "compute_capability": "8.9",
                 "core_count": 58, "shared_memory_per_block_optin": 101376}  # fmt: skip
    return types.SimpleNamespace(**described | attributes)


@pytest.mark.parametrize(("name", "key"), [
    ("NVIDIA H100 80GB HBM3", "nvidia_h100_80gb_hbm3"), ("cpu", "cpu"),
    ("  GeForce RTX™ 4090 (Laptop) ", "geforce_rtx_4090_laptop"),
])  # fmt: skip
def test_keys_are_folder_names(name, key):
    assert dataclasses.replace(CPU, name=name).key == key


@pytest.mark.parametrize(("spec", "expected"), [
    (H100, True), (H200, True), (CPU, False), (dataclasses.replace(H100, capability=100), False),
    (dataclasses.replace(H100, capability=89), False),
    (dataclasses.replace(H100, platform="cpu"), False),
], ids=["H100", "H200", "CPU", "Blackwell", "Ada", "not a GPU"])  # fmt: skip
def test_hopper_is_capability_9_0(spec, expected):
    assert spec.is_hopper is expected


def test_the_floor_is_the_slower_of_compute_and_memory():
    assert H100.floor_us(flops=812e6, bytes=0) == pytest.approx(1.0)
    assert H100.floor_us(flops=0, bytes=3186e3) == pytest.approx(1.0)
    assert H100.floor_us(flops=812e6, bytes=2 * 3186e3) == pytest.approx(2.0)
    assert CPU.floor_us(flops=1e12, bytes=1e12) == 0.0


@pytest.mark.usefixtures("unchecked")
def test_a_known_device_brings_its_measured_ceilings():
    device = fake(device_kind="NVIDIA H100 80GB HBM3", compute_capability="9.0", core_count=132)
    assert from_jax(device) is H100


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_gpu_is_described_without_ceilings():
    spec = from_jax(fake())
    assert (spec.capability, spec.num_sms, spec.smem_bytes) == (89, 58, 101376)
    assert (spec.read_gbps, spec.bf16_tflops) == (0.0, 0.0)
    assert from_jax(fake(compute_capability="10.3")).capability == 103


@pytest.mark.usefixtures("unchecked")
def test_a_gpu_that_tells_little():
    spec = from_jax(types.SimpleNamespace(platform="gpu", device_kind="odd"))
    assert (spec.capability, spec.num_sms, spec.smem_bytes) == (0, 1, 99 * 1024)


def test_what_is_no_gpu_is_a_cpu():
    assert from_jax(jax.local_devices(backend="cpu")[0]) == CPU


def test_the_innermost_injected_device_counts_and_ends_with_its_block():
    real = current_device()
    with use_device(H100):
        with use_device(CPU):
            assert current_device() is CPU
        assert current_device() is H100
        with pytest.raises(ZeroDivisionError), use_device(CPU):
            raise ZeroDivisionError
        assert current_device() is H100
    assert current_device() == real


@pytest.mark.gpu
def test_the_gpu_at_hand_is_described():
    spec = current_device()
    assert spec.platform == "gpu"
    assert spec.num_sms > 1
    assert spec.smem_bytes >= 99 * 1024
