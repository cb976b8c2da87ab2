"""Rotary frequencies against formulas written on their own, and against known numbers."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.models.config import DecoderConfig, RopeScaling
from jaxinfer.models.rope import inverse_frequencies, rope_angles, uses_local_rope
from tests.models.families import CONFIGS
from tests.models.oracle import frequency, magnitude

SCALINGS = st.builds(
    RopeScaling,
    rope_type=st.sampled_from(["linear", "llama3", "yarn"]),
    factor=st.floats(1, 64),
    original_max_position_embeddings=st.sampled_from([32, 2048, 8192, 32_768]),
    low_freq_factor=st.floats(0.5, 2),
    high_freq_factor=st.floats(3, 8),
    beta_fast=st.floats(8, 64),
    beta_slow=st.floats(0.5, 2),
    attention_factor=st.none() | st.floats(0.5, 2),
)


@settings(deadline=None)
@given(
    scaling=st.none() | SCALINGS,
    head_dim=st.sampled_from([2, 16, 64, 80, 128, 256]),
    theta=st.sampled_from([500.0, 1e4, 1e5, 5e5, 1e6]),
)
def test_frequencies(scaling, head_dim, theta):
    got, size = inverse_frequencies(head_dim, theta, scaling)
    want = [frequency(i, head_dim, theta, scaling) for i in range(head_dim // 2)]
    np.testing.assert_allclose(got, want, rtol=1e-12)
    assert size == pytest.approx(magnitude(scaling))
    # A stretch never makes a pair turn faster, nor more than `factor` times slower.
    plain, _ = inverse_frequencies(head_dim, theta, None)
    factor = 1.0 if scaling is None else scaling.factor
    assert (got <= plain * (1 + 1e-12)).all()
    assert (got >= plain / factor * (1 - 1e-12)).all()


def test_llama_31():
    """Its published parameters: 29 pairs turn as before, 29 are stretched by 8."""
    scaling = RopeScaling(
        rope_type="llama3", factor=8.0, original_max_position_embeddings=8192,
        low_freq_factor=1.0, high_freq_factor=4.0,
    )  # fmt: skip
    got, size = inverse_frequencies(128, 5e5, scaling)
    ratio = 5e5 ** -(np.arange(64) / 64) / got
    assert size == 1.0
    wavelengths = 2 * math.pi * 5e5 ** (np.arange(64) / 64)
    np.testing.assert_allclose(ratio[wavelengths < 2048], 1)
    np.testing.assert_allclose(ratio[wavelengths > 8192], 8)
    between = ratio[(wavelengths >= 2048) & (wavelengths <= 8192)]
    assert len(between) == 64 - 29 - 29
    assert (np.diff(between) > 0).all()


def test_yarn_of_qwen():
    """Factor 4 over 32768 tokens: the paper's equations 17, 22 and 23 by hand for three pairs."""
    scaling = RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=32_768)
    got, size = inverse_frequencies(128, 1e6, scaling)
    assert size == pytest.approx(1.1386294361119891)
    # 32 turns within 32768 tokens are made by pair 23.6, one turn by pair 39.7: from 23 to 40.
    plain = 1e6 ** -(np.arange(64) / 64)
    np.testing.assert_allclose(got[:24], plain[:24])
    np.testing.assert_allclose(got[40:], plain[40:] / 4)
    np.testing.assert_allclose(got[30], plain[30] * (10 / 17) + plain[30] / 4 * (7 / 17))


def test_local_layers_have_their_own_base_and_no_stretch():
    config = CONFIGS["gemma3-linear"]
    assert uses_local_rope(config)
    positions = jnp.array([[0, 1, 7]], jnp.int32)
    for local, base, stretch in ((True, 1e4, 1.0), (False, 1e6, 8.0)):
        angle = np.outer([0, 1, 7], base ** -(np.arange(16) / 16)) / stretch
        cos, sin = rope_angles(config, positions, local=local)
        np.testing.assert_allclose(cos[0], np.cos(angle), atol=1e-6)
        np.testing.assert_allclose(sin[0], np.sin(angle), atol=1e-6)


def test_a_model_without_local_layers_needs_one_set():
    assert not uses_local_rope(DecoderConfig.tiny())
    assert not uses_local_rope(CONFIGS["mistral-window"])  # one base for all


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"rope_type": "ntk", "factor": 2.0}, r"one of \('linear', 'llama3', 'yarn'\); got 'ntk'"),
        ({"rope_type": "linear", "factor": 0.5}, "at least 1; got 0.5"),
        ({"rope_type": "linear", "factor": math.nan}, "at least 1; got nan"),
        ({"rope_type": "yarn", "factor": 2.0}, "needs original_max_position_embeddings > 0; got 0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_scalings(fields, match):
    with pytest.raises(ValueError, match=match):
        RopeScaling(**fields)
