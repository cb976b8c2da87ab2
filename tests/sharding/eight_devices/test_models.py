"""Decoders divided over devices: the same weights, the same scores as the float64 oracle."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxinfer.evaluation import token_nll
from jaxinfer.models.cache import PagedKVCache
from jaxinfer.models.config import DecoderConfig
from jaxinfer.models.decoder import Decoder
from jaxinfer.models.functions import decode_step, forward, logits, prefill
from jaxinfer.pallas_kernels import plgpu
from tests.ops.cases import quick_compilation
from tests.sharding.eight_devices import scored
from tests.sharding.eight_devices.scored import CONFIGS, NINE, close, weights

LENGTH = 19
tokens = functools.partial(scored.tokens, length=LENGTH)
expected = functools.partial(scored.expected, length=LENGTH)
EVERY_SIZE = ("llama-9-3", "qwen2", "qwen3", "gemma3")
# One device divides no head: there families are as without a mesh.
CASES = [(name, n) for name in EVERY_SIZE for n in (2, 4)]
CASES += [("llama-9-3", 1), ("llama-9-3", 3), ("llama-9-3", 8), ("qwen2", 5), ("llama-mha", 4)]
CASES += [("gemma-softcaps", 2), ("mistral-window", 3), ("llama-tied-mqa", 4)]


def divided(name: str, n: int, dtype=jnp.float32) -> Decoder:
    return Decoder.from_weights(
        CONFIGS[name], weights(name).__getitem__, dtype=dtype, mesh=f"tensor={n}"
    )


def new_cache(model: Decoder, max_len: int = 48) -> PagedKVCache:
    return PagedKVCache.create(
        model.config, batch_size=2, max_len=max_len, page_size=16, dtype=jnp.float32,
        parallel=model.parallel,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "n"), CASES)
def test_scores_of_a_prompt_a_chunk_and_steps(name, n):
    """Ragged rows; every token is scored."""
    model, ids, want = divided(name, n), tokens(name), expected(name)
    cache = new_cache(model)

    @jax.jit(static_argnames="fresh", donate_argnames="cache")
    def every(model, ids, counts, *, cache, fresh):
        hidden, cache = forward(model, ids, cache, counts, fresh=fresh)
        return logits(model, hidden), cache

    with quick_compilation():
        at = np.zeros(2, np.int64)
        for counts, fresh in (((9, 5), True), ((3, 7), False)):
            chunk = np.zeros((2, 9), np.int32)
            for row, count in enumerate(counts):
                chunk[row, :count] = ids[row, at[row] : at[row] + count]
            got, cache = every(
                model, jnp.asarray(chunk), jnp.asarray(counts), cache=cache, fresh=fresh
            )
            assert got.shape == (2, 9, 97)
            for row, count in enumerate(counts):
                part = want[row, at[row] : at[row] + count]
                close(got[row, :count], part, label=f"{fresh=} {row=}")
            at += counts
        step = jax.jit(decode_step, donate_argnames="cache")
        for t in range(12, 15):
            before = cache.k_pages[0]
            scores, cache = step(model, jnp.asarray(ids[:, t]), cache=cache)
            close(scores, want[:, t], label=f"step {t}")
            assert before.is_deleted()  # updated in place
    assert cache.lengths.tolist() == [15, 15]


@pytest.mark.parametrize(("name", "n"), [(name, n) for name in EVERY_SIZE for n in (2, 3, 8)])
def test_weights_are_kept_to_the_bit(name, n):
    model = divided(name, n)
    found = dict(model.canonical_weights())
    assert found.keys() == weights(name).keys()
    for weight, array in found.items():
        np.testing.assert_array_equal(np.asarray(array), weights(name)[weight], err_msg=weight)


@pytest.mark.parametrize("n", [2, 4])
def test_a_device_has_its_part_of_weights_and_pages_only(n):
    model = divided("llama-mha", n, jnp.bfloat16)
    cache = new_cache(model)
    whole = sum(array.size * 2 for array in weights("llama-mha").values())

    def held(tree, device) -> int:
        shards = (s for array in jax.tree.leaves(tree) for s in array.addressable_shards)
        return sum(shard.data.nbytes for shard in shards if shard.device == device)

    for device in jax.devices()[:n]:
        # Six heads on four devices are eight.
        padding = 1.0 if n == 2 else 8 / 6
        assert held(model, device) <= 1.05 * padding * whole / n
        assert held(cache.k_pages, device) == 2 * 6 * 16 * 16 * 4 * 6 / n * padding
    for device in jax.devices()[n:]:
        assert held((model, cache.k_pages), device) == 0


def test_a_divided_model_is_divided_anew():
    model = divided("gemma3", 2).divide("tensor=3")
    assert model.parallel is not None
    assert model.parallel.size == 3
    for weight, array in model.canonical_weights():
        np.testing.assert_array_equal(np.asarray(array), weights("gemma3")[weight])


def test_random_weights_do_not_depend_on_the_mesh():
    one = Decoder(NINE, dtype=jnp.float32)
    two = Decoder(NINE, dtype=jnp.float32, mesh="tensor=2")
    for (name, a), (_, b) in zip(one.canonical_weights(), two.canonical_weights(), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=name)


def test_a_mesh_with_explicit_axes():
    """What `jax.make_mesh` gives; operations of the caller's program are still XLA's to place."""
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Explicit,))
    model = Decoder.from_weights(
        NINE, weights("llama-9-3").__getitem__, dtype=jnp.float32, mesh=mesh
    )
    with quick_compilation():
        ids = jnp.asarray(tokens("llama-9-3"))
        scores, _ = jax.jit(prefill, static_argnames="fresh")(
            model, ids, new_cache(model), fresh=True
        )
    close(scores, expected("llama-9-3")[:, -1])


def test_what_devices_tell_each_other():
    """Two sums per layer and one for the embedding; the scores are gathered, nothing else is."""
    model = divided("qwen2", 2)
    step = jax.jit(decode_step)
    with quick_compilation():
        text = step.lower(model, jnp.zeros(2, jnp.int32), new_cache(model)).compile().as_text()
    assert text is not None
    kinds = re.findall(r" (all-[a-z]+|collective-[a-z]+|reduce-scatter)(?:-start)?\(", text)
    assert sorted(kinds) == ["all-gather", *["all-reduce"] * (2 * CONFIGS["qwen2"].num_layers + 1)]


def test_kernels_are_lowered_inside():
    """On Hopper, every device runs the Mosaic kernels on its part."""
    config = DecoderConfig.tiny(
        num_heads=8, num_kv_heads=2, head_dim=128, hidden_size=256, intermediate_size=512,
        num_layers=1,
    )  # fmt: skip
    model = Decoder(config, mesh="tensor=2")
    cache = PagedKVCache.create(config, batch_size=2, max_len=128, parallel=model.parallel)
    # A new function, since JAX does not trace a known one again for another device.
    function = functools.partial(decode_step)
    text = plgpu.lower_for_cuda(function, model, jnp.zeros(2, jnp.int32), cache)
    assert "mosaic_gpu" in text


def test_perplexity():
    ids = np.random.default_rng(2).integers(0, 97, 40)
    one = Decoder.from_weights(NINE, weights("llama-9-3").__getitem__, dtype=jnp.float32)
    with quick_compilation():
        want = token_nll(one, ids, window=24, stride=12)
        got = token_nll(divided("llama-9-3", 2), ids, window=24, stride=12)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
