"""Decode attention on queries, keys and values of real models: their logits are no normal ones."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.models.cache import PagedKVCache
from jaxinfer.models.functions import forward
from jaxinfer.pallas_kernels.observe import observe
from tests.metrics import assert_close, assert_dtype_close
from tests.models import real
from tests.ops.decode_attention.calls import op, reference
from tests.ops.paging import paged
from tests.paths import REPOSITORY, needs_model

TOKENS = 200
# Layer 0 of Qwen2.5 has logits of more than a thousand, layer 3 of Gemma a window.
LAYERS = {"smollm2": (0, 18), "gemma3": (3, 5), "qwen25": (0, 8)}


@functools.lru_cache(maxsize=1)
def captured(name: str):
    """Of the layers: query `[1, T, N, H]`, key and value `[1, T, K, H]`, scale and window."""
    model = real.decoder(name, "float32")
    text = (REPOSITORY / "LICENSE").read_text()
    tokens = jnp.asarray(real.tokenizer(name).encode(text)[:TOKENS], jnp.int32)[None]
    cache = PagedKVCache.create(model.config, batch_size=1, max_len=256, dtype=jnp.float32)
    rules = []

    @jax.jit
    def arrays(model, tokens, cache):
        calls = []
        with observe("attention", lambda **call: calls.append(call)):
            forward(model, tokens, cache, fresh=True)
        chosen = [calls[layer] for layer in LAYERS[name]]
        rules.extend((call["scale"], call["visibility"].left) for call in chosen)
        return [[call[part] for part in ("query", "key", "value")] for call in chosen]

    found = jax.device_get(arrays(model, tokens, cache))
    return [(*qkv, *rule) for qkv, rule in zip(found, rules, strict=True)]


# Weights over a reference of 0 overflow before they are computed again.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
@pytest.mark.parametrize("softmax", ["online", "unified", "unified by phi"])
@pytest.mark.parametrize("name", [pytest.param(n, marks=needs_model(n)) for n in LAYERS])
def test_the_last_tokens_of_two_requests(hopper, name, softmax):
    """One request has the whole text, one half of it.

    References from the keys serve these layers, φ = 0 all but those with logits of hundreds.
    """
    for query, key, value, scale, left in captured(name):
        lengths = jnp.array([TOKENS, TOKENS // 2], jnp.int32)
        rows = jnp.stack([jnp.asarray(query)[0, length - 1] for length in (TOKENS, TOKENS // 2)])
        keys, values = (jnp.broadcast_to(x, (2, *x.shape[1:])) for x in (key, value))
        q, keys, values = (x.astype(jnp.bfloat16) for x in (rows[:, None], keys, values))
        k_pages, v_pages, table = paged(keys, values, page_size=64)
        arrays = q, k_pages, v_pages, table, lengths
        window = None if left is None else (left, 0)
        options: dict[str, Any] = {"scale": scale, "local_window_size": window}
        if softmax == "unified by phi":
            options |= {"softmax": "unified", "phi": jnp.zeros(q.shape[2])}
        else:
            options["softmax"] = softmax
        call = op("mosaic", return_fallbacks=True, **options)
        *got, fallbacks = hopper.run(call, *arrays, num_sms=2 * key.shape[2])
        want = reference(*arrays, scale=scale, left_window=left)
        assert np.isfinite(np.asarray(got[0], np.float32)).all()
        assert_dtype_close(got[0], want[0], "bfloat16")
        # Logits of a thousand are sums of large products: float32 keeps seven digits of them.
        size = max(np.abs(np.asarray(want[1])).max(), 1.0)
        assert_close(np.asarray(got[1]) / size, np.asarray(want[1]) / size, rms=1e-5, max_abs=1e-4)
        far = np.abs(np.asarray(want[1])).max() > 100
        assert (fallbacks > 0) == (softmax == "unified by phi" and far)
