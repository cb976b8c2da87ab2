"""A decode step in which the projection of queries, keys and values is one launch with the rest."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import Decoder, DecoderConfig, PagedKVCache, decode_step, prefill
from jaxinfer.pallas_kernels import plgpu
from jaxinfer.pallas_kernels.device import H100
from jaxinfer.pallas_kernels.dispatch import choices, force_implementation
from tests.metrics import relative_rms


def scores(config: DecoderConfig, joined: bool) -> np.ndarray:
    """Scores of two steps after a prompt, `[2, B, V]`."""
    model = Decoder(config, dtype=jnp.bfloat16)
    cache = PagedKVCache.create(config, batch_size=2, max_len=64, page_size=16, dtype=jnp.bfloat16)
    prompt = jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    _, cache = jax.jit(prefill, static_argnames="fresh")(model, prompt, cache=cache, fresh=True)
    where = contextlib.nullcontext()
    if joined:
        where = plgpu.interpret(dataclasses.replace(H100, num_sms=4))
    found = []
    with where, force_implementation("xla"):
        # What is forced last, and for this op by name, comes first.
        name = "mosaic" if joined else "separate"
        with force_implementation(name, op="project_rope_write"):
            step = jax.jit(lambda model, tokens, cache: decode_step(model, tokens, cache=cache))
            for tokens in ([2, 7], [1, 8]):
                logits, cache = step(model, jnp.array(tokens), cache)
                found.append(np.asarray(logits, np.float32))
    assert choices()["project_rope_write"].implementation == name
    return np.stack(found)


@pytest.mark.parametrize("norms", [False, True], ids=["plain", "normed heads"])
def test_scores_are_those_of_separate_ops(norms):
    config = dataclasses.replace(
        DecoderConfig.tiny(), hidden_size=128, num_heads=2, num_kv_heads=1, head_dim=128,
        num_layers=2, qk_norm=norms,
    )  # fmt: skip
    assert relative_rms(scores(config, True), scores(config, False)) < 2e-2
