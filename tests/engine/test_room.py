"""A KV cache that the device does not hold, on a device of our own making."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import psutil
import pytest

from jaxinfer.engine.config import EngineConfig
from jaxinfer.engine.room import room_for
from jaxinfer.errors import KVCacheFullError
from jaxinfer.models.config import DecoderConfig

MODEL = DecoderConfig.tiny()
PAGE_BYTES = 2 * 2 * 16 * 2 * 16 * 4  # keys and values, layers, tokens, KV heads, numbers, bytes


def sizes(num_pages: int) -> EngineConfig:
    return EngineConfig(
        max_model_len=128, num_pages=num_pages, page_size=16, max_num_seqs=4,
        max_num_batched_tokens=32, steps_per_sync=2, dtype=jnp.float32,
    )  # fmt: skip


def gpu(monkeypatch, stats: dict[str, int] | None) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(memory_stats=lambda: stats)])


def test_what_is_free_on_a_gpu_counts(monkeypatch):
    gpu(monkeypatch, {"bytes_limit": 10 * PAGE_BYTES, "bytes_in_use": 6 * PAGE_BYTES})
    with room_for(sizes(4), MODEL):
        pass
    with pytest.raises(KVCacheFullError, match=r"5 pages of 16 tokens .*lower num_gpu_blocks"):
        room_for(sizes(5), MODEL).__enter__()


def test_a_device_that_does_not_tell_is_tried(monkeypatch):
    gpu(monkeypatch, None)

    def make():
        with room_for(sizes(10**9), MODEL):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    with pytest.raises(KVCacheFullError, match=r"takes \d+\.\d GB; lower num_gpu_blocks_override"):
        make()


def test_what_others_left_on_a_cpu_counts(monkeypatch):
    left = SimpleNamespace(available=4 * PAGE_BYTES, total=100 * PAGE_BYTES)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: left)
    with room_for(sizes(4), MODEL):
        pass
    with pytest.raises(KVCacheFullError, match=r"5 pages of 16 tokens .*lower num_gpu_blocks"):
        room_for(sizes(5), MODEL).__enter__()
