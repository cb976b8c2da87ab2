"""References that a calibration finds, and what the unified softmax makes of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.calibration import layer_softmax, logit_statistics
from jaxinfer.pallas_kernels.attention.mask import Visibility
from jaxinfer.pallas_kernels.decode_attention.api import decode_attention
from jaxinfer.pallas_kernels.decode_attention.shape import Config
from tests.ops.cases import normal
from tests.ops.paging import paged

# Logits of the keys before and from token 64 on, and of which dtypes one reference serves.
LOGITS = {
    "alike": (0.0, 0.0, ("bfloat16", "float16")),
    "high": (300.0, 300.0, ("bfloat16", "float16")),
    "falling": (4.0, -6.0, ("bfloat16",)),
    "rising": (-6.0, 4.0, ("bfloat16",)),
    "far": (40.0, -40.0, ("bfloat16",)),
    "too far": (60.0, -60.0, ()),
    "sink": (None, 0.0, ()),  # one key with a logit of 120 before many of 0
}


# What overflows is computed again; the simulated wgmma, a product of NumPy, says so.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", LOGITS)
def test_the_kernel_does_what_the_verdict_says(hopper, name, dtype):
    """Served layers never fall back, for any row and division; others do."""
    before, after, served = LOGITS[name]
    T, K, H = 130, 2, 64
    logits = np.full(T, after, np.float32)
    logits[:64] = before if before is not None else 0.0
    if before is None:
        logits[0] = 120.0
    key = jnp.broadcast_to((logits / H**0.5)[None, :, None, None], (1, T, K, H)).astype(dtype)
    query, value = jnp.ones((1, T, 2 * K, H), dtype), normal(1, (1, T, K, H), dtype)
    rule = Visibility(is_causal=True, left=None, right=None, q_offset=jnp.zeros(1, jnp.int32),
                      query_lengths=None, key_lengths=None)  # fmt: skip
    seen = logit_statistics(query=query, key=key, value=value, visibility=rule, scale=H**-0.5,
                            logits_softcap=None)  # fmt: skip
    layer = layer_softmax(jax.device_get(seen), dtype)
    assert (layer.wide_heads(dtype) == ()) == (dtype in served)
    lengths = jnp.array([1, 64, 65, 130])
    call = functools.partial(
        decode_attention, softmax="unified", phi=jnp.asarray(layer.phi, jnp.float32),
        implementation="mosaic", return_fallbacks=True, config=Config(block=64, stages=2),
    )  # fmt: skip
    paged_keys, paged_values = (
        jnp.broadcast_to(jnp.pad(x, ((0, 0), (0, 62), (0, 0), (0, 0))), (4, 192, K, H))
        for x in (key, value)
    )
    arrays = jnp.ones((4, 1, 2 * K, H), dtype), *paged(paged_keys, paged_values, page_size=64)
    fallbacks = [int(hopper.run(call, *arrays, lengths, num_sms=K * n)[1]) for n in (1, 7)]
    if dtype in served:
        assert fallbacks == [0, 0]
    else:
        assert max(fallbacks) > 0
