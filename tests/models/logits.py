"""Logits of a decoder that was read from a file."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.models.cache import PagedKVCache
from jaxinfer.models.checkpoint.base import Checkpoint
from jaxinfer.models.checkpoint.open import load_model
from jaxinfer.models.config import DecoderConfig
from jaxinfer.models.functions import forward, logits
from tests.metrics import assert_close
from tests.models.families import CONFIGS, random_weights
from tests.models.oracle import decoder_logits

TOKENS = [5, 17, 3, 96, 41, 41, 8, 0, 77, 23, 60]


@jax.jit
def _every(model, tokens, cache):
    return logits(model, forward(model, tokens, cache, fresh=True)[0])


def read_logits(opened: Checkpoint) -> np.ndarray:
    """`[T, V]` after each of `TOKENS`, float32."""
    model = load_model(opened, dtype=jnp.float32)
    cache = PagedKVCache.create(
        model.config, batch_size=1, max_len=16, page_size=16, dtype=jnp.float32
    )
    return np.asarray(_every(model, jnp.asarray([TOKENS], jnp.int32), cache)[0])


def assert_config(got: DecoderConfig, want: DecoderConfig) -> None:
    """Equal, but for fields that say the same in two ways, and rounding."""
    assert got.scale == pytest.approx(want.scale)
    if got.rope_scaling and got.rope_scaling.rope_type == "linear":  # the context has no effect
        assert want.rope_scaling
        assert got.rope_scaling.factor == want.rope_scaling.factor
        got = dataclasses.replace(got, rope_scaling=want.rope_scaling)
    assert got.rms_norm_eps == pytest.approx(want.rms_norm_eps)  # GGUF files hold float32
    same = {"attention_scale": want.attention_scale, "rms_norm_eps": want.rms_norm_eps}
    assert dataclasses.replace(got, **same) == want


def assert_logits(opened: Checkpoint, name: str) -> None:
    """Compare with the float64 oracle on the weights that the file was written from.

    Limits as in `test_decoder`.
    """
    want = decoder_logits(CONFIGS[name], random_weights(name), TOKENS)
    assert_close(read_logits(opened), want, rms=8e-6, max_abs=5e-5, label=name)
