"""Every spec of `decode_attention` lowers for an H100, on any machine."""

import jax.numpy as jnp
import pytest

from jaxinfer.pallas_kernels import plgpu
from jaxinfer.pallas_kernels.decode_attention.config import candidates
from jaxinfer.pallas_kernels.decode_attention.shape import Config
from jaxinfer.pallas_kernels.decode_attention.specs import SPECS, DecodeSpec, make_inputs
from tests.ops.cases import cases, shapes_of
from tests.ops.decode_attention.calls import op


@pytest.mark.parametrize("spec", cases(SPECS))
def test_lowers(h100, spec):
    text = plgpu.lower_for_cuda(op("mosaic", spec), *shapes_of(make_inputs, spec), spec=h100)
    # One CTA would merge the pieces of many: few KV heads over long tables.
    many = spec.K < 4 and spec.S > 3072 and spec.local_window_size is None
    assert text.count("custom_call @mosaic_gpu") == 1 + many


@pytest.mark.parametrize("H", [64, 128, 256])
def test_the_most_rows_fit(h100, H):
    spec = DecodeSpec(model="rows", B=2, S=256, N=8, K=1, H=H, T=8, page_size=16)
    plgpu.lower_for_cuda(op("mosaic"), *shapes_of(make_inputs, spec), spec=h100)


@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
@pytest.mark.parametrize("block", [64, 128, 256])
def test_page_sizes_and_blocks(h100, page_size, block):
    spec = DecodeSpec(model="pages", B=2, S=256, N=4, K=1, H=64, page_size=page_size)
    call = op("mosaic", config=Config(block=block, stages=2))
    plgpu.lower_for_cuda(call, *shapes_of(make_inputs, spec), spec=h100)


@pytest.mark.parametrize(("N", "K", "H"), [(9, 3, 64), (32, 8, 128), (4, 1, 256)])
def test_tilings_that_compete_lower(h100, N, K, H):
    """Of SmolLM2, Llama-3-8B and Gemma 3, each over requests that several CTAs share."""
    spec = DecodeSpec(model="grid", B=8, S=1024, N=N, K=K, H=H)
    for config in candidates(h100, N=N, K=K, H=H, page_size=spec.page_size):
        call = op("mosaic", config=config)
        plgpu.lower_for_cuda(call, *shapes_of(make_inputs, spec), spec=h100)


@pytest.mark.parametrize("with_phi", [False, True])
@pytest.mark.parametrize("spec", cases(SPECS, "ci"))
def test_unified_softmax_lowers(h100, spec, with_phi):
    phi = jnp.zeros((spec.N,)) if with_phi else None
    call = op("mosaic", spec, softmax="unified", phi=phi, return_fallbacks=True)
    plgpu.lower_for_cuda(call, *shapes_of(make_inputs, spec), spec=h100)
