"""Sizes that are chosen, and sizes that are refused."""

import types

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.engine import sizing
from jaxinfer.engine.config import EngineConfig
from jaxinfer.engine.sizing import choose_sizes
from jaxinfer.errors import KVCacheFullError
from jaxinfer.models.config import DecoderConfig
from jaxinfer.pallas_kernels import tuning
from jaxinfer.pallas_kernels.device import H100, use_device
from tests.engine.small import decoder

DEFAULTS = {
    "max_model_len": None, "max_num_seqs": None, "max_num_batched_tokens": None, "block_size": 64,
    "gpu_memory_utilization": 0.9, "num_gpu_blocks_override": None, "steps_per_sync": None,
    "seed": 0, "implementation": None, "batch_invariant": False,
}  # fmt: skip
# Bytes of a page of 64 tokens: 2 layers, keys and values, 2 heads of 16 float32.
PAGE = 2 * 2 * 64 * 2 * 16 * 4


def choose(**fields) -> EngineConfig:
    return choose_sizes(decoder(2), **(DEFAULTS | fields))


@pytest.fixture
def gpu(monkeypatch):
    """A device with memory for so many pages beside weights and activations."""

    def with_room_for(pages: float, stats: dict | None = None):
        scratch = sizing._scratch_bytes(decoder(2).config, rows=64, tokens=8192, length=512)
        limit = 1000 + scratch + int(pages * PAGE)
        known = {"bytes_limit": limit, "bytes_in_use": 1000} if stats is None else stats
        device = types.SimpleNamespace(memory_stats=lambda: known)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "local_devices", lambda: [device])

    return with_room_for


def test_defaults_on_a_cpu():
    made = choose()
    assert (made.max_model_len, made.max_num_seqs, made.max_num_batched_tokens) == (512, 8, 512)
    assert (made.num_pages, made.page_size, made.steps_per_sync) == (8 * 8, 64, 2)
    assert made.dtype == jnp.float32
    assert not made.full_tables


def test_the_cache_of_a_cpu_takes_half_of_what_is_free(monkeypatch):
    monkeypatch.setattr(sizing, "free_memory", lambda: 6 * PAGE)
    assert choose().num_pages == 3
    monkeypatch.setattr(sizing, "free_memory", lambda: PAGE)
    with pytest.raises(KVCacheFullError, match=r"no memory is left .*GB\); choose a smaller model"):
        choose()


def test_the_cache_of_a_cpu_is_bounded(monkeypatch):
    monkeypatch.setattr(sizing, "_CPU_CACHE_BYTES", 3 * PAGE)
    made = choose()
    assert made.num_pages == 3
    assert made.max_model_len == 192  # what one request can hold
    assert choose(max_model_len=500).max_model_len == 500


def test_the_cache_of_a_gpu_is_what_is_left(gpu):
    gpu(37.5)
    made = choose(gpu_memory_utilization=1.0)
    assert (made.num_pages, made.max_num_seqs, made.max_num_batched_tokens) == (37, 64, 8192)
    assert (made.steps_per_sync, made.steps_per_program) == (8, 8)
    gpu(100_000)
    assert choose().num_pages == 64 * 8  # more than all rows need is not taken


@pytest.mark.parametrize("pages", [0.9, -50])
def test_no_memory_is_left(gpu, pages):
    gpu(pages)
    with pytest.raises(KVCacheFullError, match=r"no memory is left.*gpu_memory_utilization"):
        choose(gpu_memory_utilization=1.0)


@pytest.mark.parametrize("stats", [{}, {"bytes_in_use": 3}])
def test_a_device_that_does_not_tell(gpu, stats):
    gpu(1, stats)
    with pytest.raises(KVCacheFullError, match="set num_gpu_blocks_override"):
        choose()
    assert choose(num_gpu_blocks_override=7).num_pages == 7


@pytest.mark.parametrize(
    "name",
    ["max_model_len", "max_num_seqs", "max_num_batched_tokens", "steps_per_sync",
     "num_gpu_blocks_override"],
)  # fmt: skip
@pytest.mark.parametrize("value", [0, -5])
def test_sizes_must_be_positive(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be positive; got {value}"):
        choose(**{name: value})


@pytest.mark.parametrize("share", [0, -1, 1.1, float("nan")])
def test_a_share_of_memory(share):
    with pytest.raises(ValueError, match="gpu_memory_utilization must be more than 0 and at most"):
        choose(gpu_memory_utilization=float(share))


def test_pages_that_kernels_lack():
    with pytest.raises(ValueError, match=r"block_size must be one of \(16, 32, 64, 128\); got 48"):
        choose(block_size=48)


def test_a_context_longer_than_the_models():
    with pytest.raises(ValueError, match=r"max_model_len must be at most 512.*; got 513"):
        choose(max_model_len=513)


@pytest.mark.parametrize(
    ("config", "dtype", "whole"),
    [
        (DecoderConfig.llama3_8b(), jnp.bfloat16, True),
        (DecoderConfig.llama3_8b(), jnp.float32, False),  # a dtype that the kernel refuses
        (DecoderConfig.tiny(), jnp.bfloat16, False),  # a head_dim that it refuses
    ],
)
def test_tables_are_whole_only_for_the_kernel_that_reads_what_lengths_reach(config, dtype, whole):
    assert not sizing.reads_only_lengths(config, 64, dtype)  # on a CPU
    with use_device(H100):
        assert sizing.reads_only_lengths(config, 64, dtype) == whole


@pytest.mark.parametrize(("slow", "rows", "width", "whole"), [
    ("b8 s8192", 64, 128, False),
    ("b8 s8192", 64, 16, True),  # tables that reach another number of tokens
    ("b8 s8192", 1, 128, True),  # fewer requests
    ("b64 s8192", 48, 100, False),
    ("b8 s8192 n4 k1 h256 p64 w511", 8, 128, False),  # layers with a window only
    ("b64 s1024", 100, 2048, True),  # a smaller capacity
], ids=str)  # fmt: skip
def test_tables_are_short_where_xla_may_serve_a_step(monkeypatch, slow, rows, width, whole):
    """It would copy all pages of whole tables, at every step."""
    config = DecoderConfig.tiny(
        num_layers=2, num_heads=4, num_kv_heads=1, head_dim=256, sliding_window=512,
        local_layers=(True, False),
    )  # fmt: skip
    xla = {"implementation": "xla"}
    monkeypatch.setattr(
        tuning, "lookup", lambda op, device, key: [("file", xla)] if key.startswith(slow) else []
    )
    with use_device(H100):
        assert whole == sizing.reads_only_lengths(config, 64, jnp.bfloat16, rows=rows, width=width)


def test_sizes_ask_for_the_tables_that_the_engine_makes(monkeypatch):
    asked = []
    monkeypatch.setattr(
        sizing, "reads_only_lengths", lambda *_, **sizes: asked.append(sizes) or False
    )
    choose(max_model_len=100, max_num_seqs=5)
    assert asked == [{"rows": 5, "width": 2}]
