"""Decoders whose tokens the mesh axis `seq` shares: the same scores as the float64 oracle."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.models.cache import PagedKVCache
from jaxinfer.models.config import DecoderConfig
from jaxinfer.models.decoder import Decoder
from jaxinfer.models.functions import decode_step, forward, logits
from jaxinfer.pallas_kernels import plgpu
from tests.ops.cases import quick_compilation
from tests.sharding.eight_devices import scored
from tests.sharding.eight_devices.scored import CONFIGS, close, weights

LENGTH = 40
tokens = functools.partial(scored.tokens, length=LENGTH)
expected = functools.partial(scored.expected, length=LENGTH)
# Windows and soft caps; numbers of devices that are a power of two, are none, and are many.
CASES = [
    ("llama-9-3", "seq=8"), ("llama-9-3", "seq=2,tensor=2"), ("qwen2", "seq=3"),
    ("gemma3", "seq=4"), ("gemma-softcaps", "seq=2"), ("mistral-window", "seq=5"),
]  # fmt: skip


def shared(name: str, mesh: str, dtype=jnp.float32) -> tuple[Decoder, PagedKVCache]:
    model = Decoder.from_weights(CONFIGS[name], weights(name).__getitem__, dtype=dtype, mesh=mesh)
    cache = PagedKVCache.create(
        model.config, batch_size=2, max_len=64, page_size=16, dtype=dtype, parallel=model.parallel
    )
    return model, cache


@jax.jit(static_argnames="fresh", donate_argnames="cache")
def every(model, ids, counts, *, cache, fresh):
    """Scores of every token of a call."""
    hidden, cache = forward(model, ids, cache, counts, fresh=fresh)
    return logits(model, hidden), cache


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_scores_of_a_prompt_chunks_and_steps(name, mesh):
    """Ragged rows of odd lengths, that go on anywhere; every token is scored."""
    (model, cache), ids, want = shared(name, mesh), tokens(name), expected(name)
    with quick_compilation():
        at = np.zeros(2, np.int64)
        for counts, fresh in (((13, 5), True), ((3, 7), False), ((1, 13), False), ((7, 0), False)):
            chunk = np.zeros((2, 13), np.int32)
            for row, count in enumerate(counts):
                chunk[row, :count] = ids[row, at[row] : at[row] + count]
            got, cache = every(
                model, jnp.asarray(chunk), jnp.asarray(counts), cache=cache, fresh=fresh
            )
            assert got.shape == (2, 13, 97)
            for row, count in enumerate(counts):
                part = want[row, at[row] : at[row] + count]
                if count:
                    close(got[row, :count], part, label=f"{fresh=} {row=}")
            at += counts
        step = jax.jit(decode_step, donate_argnames="cache")
        for t in range(9):
            before = cache.k_pages[0]
            active = jnp.asarray([True, t % 3 > 0])
            scores, cache = step(
                model, jnp.asarray([ids[row, at[row]] for row in range(2)]), cache, active
            )
            for row in range(2):
                if active[row]:
                    close(scores[row], want[row, at[row]], label=f"step {t} {row=}")
                    at[row] += 1
            assert before.is_deleted()  # updated in place
    assert cache.lengths.tolist() == at.tolist()


def test_what_devices_tell_each_other():
    """In a step: beside the sums and scores of `tensor`, a maximum and a sum per layer."""
    model, cache = shared("qwen2", "seq=2,tensor=2")
    step = jax.jit(decode_step)
    with quick_compilation():
        text = step.lower(model, jnp.zeros(2, jnp.int32), cache).compile().as_text()
    assert text is not None
    kinds = re.findall(r" (all-[a-z]+|collective-[a-z]+|reduce-scatter)(?:-start)?\(", text)
    layers = CONFIGS["qwen2"].num_layers
    assert sorted(kinds) == ["all-gather", *["all-reduce"] * (4 * layers + 1)]


@pytest.mark.parametrize(("T", "fresh"), [(1, False), (64, True), (64, False)])
def test_kernels_are_lowered_inside(T, fresh):
    """On Hopper, every device runs the Mosaic kernels on its part: of steps, prompts, chunks."""
    config = DecoderConfig.tiny(
        num_heads=8, num_kv_heads=2, head_dim=128, hidden_size=256, intermediate_size=512,
        num_layers=2, sliding_window=33, local_layers=(True, False),
    )  # fmt: skip
    model = Decoder(config, mesh="seq=2,tensor=2")
    cache = PagedKVCache.create(config, batch_size=2, max_len=128, parallel=model.parallel)
    # A new function, since JAX does not trace a known one again for another device.
    function = functools.partial(forward, fresh=fresh)
    text = plgpu.lower_for_cuda(function, model, jnp.zeros((2, T), jnp.int32), cache)
    assert "mosaic_gpu" in text
    assert ("decode_attention" in text) == (T == 1)
