"""Which products a model consists of."""

import json

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.autotune import products as module
from jaxinfer.autotune.products import PRESETS, model_config, products
from jaxinfer.models.checkpoint.huggingface_config import config_from_huggingface
from jaxinfer.models.config import DecoderConfig
from jaxinfer.op_choices import op_choices
from jaxinfer.pallas_kernels import tuning
from jaxinfer.pallas_kernels.device import H100
from jaxinfer.pallas_kernels.matmul.config import BUCKETS
from tests.paths import model_path

CONFIGS = {
    "llama": DecoderConfig.llama3_8b(),
    "biased": DecoderConfig.tiny(qkv_bias=True),
    "gelu": DecoderConfig.tiny(activation="gelu_tanh", sandwich_norms=True, head_dim=32),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_they_are_what_the_model_looks_up(monkeypatch, config):
    """`op_choices` decodes 8 rows; prefill has more tokens than are looked up."""
    asked = set()
    monkeypatch.setattr(tuning, "lookup", lambda op, device, key: asked.add((op, key)) or [])
    op_choices(config, H100, jnp.bfloat16)
    specs = products(config, name="model", dtype="bfloat16")
    keys = {spec.tuning_key for spec in specs if spec.M == 8}
    assert keys == {key for op, key in asked if op == "matmul"}


def test_every_bucket_has_every_product():
    specs = products(DecoderConfig.tiny(qkv_bias=True), name="tiny", dtype="float16")
    parts = ("qkv", "o", "gate_up", "down", "head")
    assert [(spec.M, spec.part) for spec in specs] == [(M, p) for M in BUCKETS for p in parts]
    assert {spec.dtype for spec in specs} == {"float16"}
    assert [spec.bias for spec in specs[:5]] == [True, False, False, False, False]
    assert [spec.gate for spec in specs[:5]] == [None, None, "silu", None, None]


def test_presets_need_no_files(monkeypatch):
    monkeypatch.setattr(module, "resolve_model", lambda *_, **__: 1 // 0)
    assert model_config("llama-3-8b") == DecoderConfig.llama3_8b()
    assert all(model_config(name).num_layers for name in PRESETS)


def test_the_preset_of_the_default_model_is_its_shape():
    path = model_path("smollm2")
    if path is None:
        pytest.skip("needs SmolLM2-135M-Instruct")
    want = products(model_config(str(path)), name="default", dtype="bfloat16")
    assert products(model_config("default"), name="default", dtype="bfloat16") == want


def test_a_configuration_alone_is_enough(tmp_path):
    """As it is fetched from the Hub: no weights, no tokenizer."""
    values = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 256,
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 128, "max_position_embeddings": 512,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert model_config(str(tmp_path)) == config_from_huggingface(values, "")


def test_nothing_is_computed():
    before = len(jax.live_arrays())
    products(DecoderConfig.llama3_8b(), name="llama-3-8b", dtype="bfloat16")
    assert len(jax.live_arrays()) == before
