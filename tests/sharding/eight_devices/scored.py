"""Small decoders, tokens for them, and the oracle's scores."""

import functools

import numpy as np

from jaxinfer.models.config import DecoderConfig
from tests.metrics import assert_close
from tests.models.families import CONFIGS as FAMILIES
from tests.models.families import weights_of
from tests.models.oracle import decoder_logits

# Nine query and three KV heads, as SmolLM2.
NINE = DecoderConfig.tiny(
    vocab_size=97, hidden_size=48, num_heads=9, num_kv_heads=3, intermediate_size=80,
    tie_embeddings=True,
)  # fmt: skip
CONFIGS = {"llama-9-3": NINE, **FAMILIES}
# As in tests/models/test_decoder.py: a device's sums are shorter, and one more follows.
close = functools.partial(assert_close, rms=8e-6, max_abs=5e-5)


@functools.cache
def weights(name: str) -> dict[str, np.ndarray]:
    return weights_of(CONFIGS[name])


@functools.cache
def tokens(name: str, *, length: int) -> np.ndarray:
    """`[2, length]`."""
    rng = np.random.default_rng(5)
    return rng.integers(0, CONFIGS[name].vocab_size, (2, length), dtype=np.int32)


@functools.cache
def expected(name: str, *, length: int) -> np.ndarray:
    """`[2, length, V]` of the oracle."""
    rows = tokens(name, length=length)
    return np.stack([decoder_logits(CONFIGS[name], weights(name), row.tolist()) for row in rows])
