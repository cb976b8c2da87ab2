"""What the functions of a decoder refuse: each by an error that names the argument."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import Decoder, DecoderConfig, PagedKVCache, decode_step, prefill
from jaxinfer.errors import ContextLengthError

pytestmark = pytest.mark.usefixtures("unchecked")
CONFIG = DecoderConfig.tiny()
MODEL = Decoder(CONFIG, dtype=jnp.float32)


def cache(config=CONFIG, rows=2, max_len=64) -> PagedKVCache:
    return PagedKVCache.create(config, batch_size=rows, max_len=max_len, dtype=jnp.float32)


def call(function=prefill, tokens=None, *, model: Any = MODEL, memory: Any = None, **more):
    """Trace only: that is when all of this is known."""
    memory = cache() if memory is None else memory
    return jax.eval_shape(lambda: function(model, tokens, cache=memory, **more))


PROMPT = np.ones((2, 3), np.int32)
REFUSED = {
    "one row": (prefill, np.ones(3, np.int32), {}, ValueError,
                "tokens must be [B, T] and not empty; got shape (3,)"),
    "three dimensions": (prefill, np.ones((2, 3, 1), np.int32), {}, ValueError, "(2, 3, 1)"),
    "none": (prefill, np.ones((2, 0), np.int32), {}, ValueError, "not empty; got shape (2, 0)"),
    "a list": (prefill, [[1, 2]], {}, TypeError,
               "tokens must be an array of integers; got list"),
    "floats": (prefill, np.ones((2, 3), np.float32), {}, TypeError, "got float32"),
    "bools": (prefill, np.ones((2, 3), bool), {}, TypeError, "got bool"),
    "rows": (prefill, np.ones((3, 3), np.int32), {}, ValueError, "the cache's B = 2; got (3, 3)"),
    "counts": (prefill, PROMPT, {"num_tokens": np.ones(3, np.int32)}, ValueError,
               "num_tokens must be [B] = (2,); got shape (3,)"),
    "float counts": (prefill, PROMPT, {"num_tokens": np.ones(2, np.float32)}, TypeError,
                     "num_tokens must be an array of integers; got float32"),
    "too long": (prefill, np.ones((2, 65), np.int32), {}, ContextLengthError,
                 "65 tokens do not fit: rows of this cache hold 64"),
    "step of rows": (decode_step, np.ones((2, 1), np.int32), {}, ValueError,
                     "tokens must be [B] and not empty; got shape (2, 1)"),
    "step of one": (decode_step, np.int32(1), {}, ValueError, "got shape ()"),
    "active": (decode_step, np.ones(2, np.int32), {"active": np.ones(2, np.int32)}, TypeError,
               "active must be an array of bool; got int32"),
    "active rows": (decode_step, np.ones(2, np.int32), {"active": np.ones(1, bool)}, ValueError,
                    "active must be [B] = (2,); got shape (1,)"),
}  # fmt: skip


@pytest.mark.parametrize(("function", "tokens", "more", "error", "message"), REFUSED.values(),
                         ids=REFUSED)  # fmt: skip
def test_arguments_that_cannot_be_meant(function, tokens, more, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call(function, tokens, **more)


@pytest.mark.parametrize(("changes", "message"), [
    ({"num_layers": 3}, "cache must have the model's 2 layers; it has 3"),
    ({"num_kv_heads": 4}, "cache must have the model's 2 KV heads of 16; it has 4 of 16"),
    ({"head_dim": 32}, "cache must have the model's 2 KV heads of 16; it has 2 of 32"),
])  # fmt: skip
@pytest.mark.parametrize("function", [prefill, decode_step])
def test_another_models_cache(function, changes, message):
    tokens = PROMPT if function is prefill else PROMPT[:, 0]
    memory = cache(dataclasses.replace(CONFIG, **changes))
    with pytest.raises(ValueError, match=re.escape(message)):
        call(function, tokens, memory=memory)


def test_no_cache_and_no_model():
    with pytest.raises(TypeError, match="cache must be a PagedKVCache; got dict"):
        call(tokens=PROMPT, memory={})
    with pytest.raises(TypeError, match="model must be a Decoder; got str"):
        call(tokens=PROMPT, model="llama")


def test_padding_may_be_longer_than_a_row():
    """A batch is padded to some bucket; what counts is the number of tokens."""
    counts = np.array([3, 64], np.int32)
    scores, _ = call(tokens=np.ones((2, 128), np.int32), num_tokens=counts)
    assert scores.shape == (2, CONFIG.vocab_size)


@pytest.mark.parametrize("dtype", ["int8", "uint32", "int16"])
def test_integers_of_any_width(dtype):
    scores, _ = prefill(MODEL, jnp.asarray(PROMPT.astype(dtype)), cache=cache())
    want, _ = prefill(MODEL, jnp.asarray(PROMPT), cache=cache())
    np.testing.assert_array_equal(scores, want)


@pytest.mark.parametrize("make", [
    lambda dtype: Decoder(CONFIG, dtype=dtype),
    lambda dtype: PagedKVCache.create(CONFIG, batch_size=1, max_len=16, dtype=dtype),
], ids=["weights", "cache"])  # fmt: skip
def test_dtypes_that_are_not_floating(make):
    with pytest.raises(TypeError, match="dtype must be a floating dtype; got int32"):
        make("int32")
