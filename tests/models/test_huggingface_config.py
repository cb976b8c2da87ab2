"""`config.json` as a `DecoderConfig`: every spelling in use, and every refusal."""

import pytest

from jaxinfer.models.checkpoint.huggingface_config import FAMILIES, config_from_huggingface
from jaxinfer.models.config import DecoderConfig, RopeScaling
from jaxinfer.models.errors import CheckpointError, UnsupportedModelError
from tests.models.families import CONFIGS
from tests.models.huggingface_files import config_json


def read(name: str, **overrides) -> DecoderConfig:
    return config_from_huggingface(config_json(name, **overrides), "config.json")


LLAMA3 = {"factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0,
          "original_max_position_embeddings": 128}  # fmt: skip


@pytest.mark.parametrize(
    ("rope", "want"),
    [
        ({"type": "linear", "factor": 2}, {"factor": 2.0}),
        ({"rope_type": "linear", "factor": 2.5}, {"factor": 2.5}),
        ({"rope_type": "llama3"} | LLAMA3, LLAMA3),
        ({"rope_type": "yarn", "factor": 4.0}, {"factor": 4.0}),
        ({"type": "yarn", "factor": 4.0, "attention_factor": 0.8}, {"attention_factor": 0.8}),
        ({"type": "yarn", "factor": 4.0, "beta_fast": 16, "beta_slow": 2}, {"beta_fast": 16.0}),
    ],
    ids=str,
)
def test_rope_scaling(rope, want):
    scaling = read("llama", rope_scaling=rope).rope_scaling
    assert scaling is not None
    assert scaling.rope_type == rope.get("rope_type", rope.get("type"))
    assert {name: getattr(scaling, name) for name in want} == want
    # Where it is left out, the context that the model was trained for is that of the file.
    trained = rope.get("original_max_position_embeddings", 512)
    assert scaling.original_max_position_embeddings == trained


@pytest.mark.parametrize("rope", [None, {}, {"rope_type": "default"}, {"type": "default"}])
def test_no_scaling(rope):
    assert read("llama", rope_scaling=rope).rope_scaling is None


def test_newer_files_keep_rope_in_one_place():
    rope = {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}
    config = read("llama", rope_parameters=rope, rope_theta=1.0)
    assert (config.rope_theta, config.rope_scaling) == (
        5e5, RopeScaling(rope_type="linear", factor=2.0, original_max_position_embeddings=512)
    )  # fmt: skip


def test_newer_gemma_keeps_a_set_per_kind_of_layer():
    rope = {
        "full_attention": {"rope_theta": 2e6, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 3e4, "rope_type": "default"},
    }
    config = read("gemma3", rope_parameters=rope)
    assert (config.rope_theta, config.local_rope_theta) == (2e6, 3e4)
    assert config.rope_scaling is not None
    assert config.rope_scaling.factor == 8.0


def test_gemma3_alone_names_what_it_changes():
    """Published files leave out what is as in the configuration class."""
    values = {"architectures": ["Gemma3ForConditionalGeneration"],
              "text_config": {"num_hidden_layers": 34, "hidden_size": 2560,
                              "intermediate_size": 10_240, "sliding_window": 1024}}  # fmt: skip
    config = config_from_huggingface(values, "config.json")
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 256)
    assert (config.vocab_size, config.max_position_embeddings) == (262_208, 131_072)
    assert [i for i in range(34) if not config.local_layers[i]] == [5, 11, 17, 23, 29]
    assert (config.sliding_window, config.tie_embeddings, config.qk_norm) == (1024, True, True)
    assert (config.rope_theta, config.local_rope_theta) == (1e6, 1e4)
    assert config.attention_scale == pytest.approx(1 / 16)
    assert config.embedding_scale == pytest.approx(2560**0.5)


def test_layers_by_name_come_before_a_pattern():
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    assert read("gemma3", layer_types=kinds).local_layers == (False, True, False, True)


@pytest.mark.parametrize(
    ("fields", "local"),
    [
        ({"use_sliding_window": True, "max_window_layers": 1}, (False, True)),
        ({"use_sliding_window": True, "max_window_layers": 0}, (True, True)),
        ({"use_sliding_window": True}, (False, False)),
        ({"use_sliding_window": None, "max_window_layers": 0}, ()),
    ],
    ids=str,
)
def test_qwen_uses_its_window_only_where_it_says_so(fields, local):
    config = read("qwen2", sliding_window=9, **fields)
    assert config.local_layers == local
    assert config.window(1) == (9 if local and local[1] else None)


def test_mistral_without_a_window():
    assert read("mistral-window", sliding_window=None).local_layers == ()


def test_defaults():
    config = read("llama", num_key_value_heads=None, rms_norm_eps=None, hidden_act=None,
                  head_dim=None)  # fmt: skip
    assert (config.num_kv_heads, config.head_dim) == (6, 8)
    assert (config.rms_norm_eps, config.rope_theta, config.activation) == (1e-6, 1e4, "silu")
    assert not config.tie_embeddings


def test_soft_caps():
    config = read("gemma3", attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
    assert (config.attention_softcap, config.final_softcap) == (50.0, 30.0)


@pytest.mark.parametrize("architectures", [["MambaForCausalLM"], [], None])
def test_an_unknown_architecture_names_the_known(architectures):
    with pytest.raises(UnsupportedModelError, match="is not supported; supported: ") as raised:
        read("llama", architectures=architectures)
    for known in FAMILIES:
        assert known in str(raised.value)


@pytest.mark.parametrize("architectures", [5, "LlamaForCausalLM", {"a": 1}, [5], [["a"]]])
def test_architectures_that_are_no_list_of_names(architectures):
    with pytest.raises(
        CheckpointError, match=r"config\.json: architectures must be a list of name"
    ):
        read("llama", architectures=architectures)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3"])
def test_more_layers_than_any_model_has(name):
    """Refused before something is made for each."""
    message = r"config\.json: num_hidden_layers must be at most 10000; got 1099511627776"
    with pytest.raises(CheckpointError, match=message):
        read(name, num_hidden_layers=2**40)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, r"gptq.*float32, float16, bfloat16"),
        ({"quantization_config": "fp8"}, "quantised weights"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "relu"}, "'relu' is not supported; supported: silu"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'.*linear, llama3, yarn"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, "truncate"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 0.7}}, "mscale = 0.7"),
    ],
    ids=str,
)
def test_unsupported_variants(fields, match):
    with pytest.raises(UnsupportedModelError, match=match):
        read("llama", **fields)


SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
         "intermediate_size", "max_position_embeddings")  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_a_missing_field_is_named(name):
    with pytest.raises(CheckpointError, match=rf"config.json: field '{name}' is missing"):
        read("llama", **{name: None})


NO_NUMBERS = (float("nan"), float("inf"), float("-inf"), "many", [1], True, -1)


@pytest.mark.parametrize("value", [0, 1.5, *NO_NUMBERS])
@pytest.mark.parametrize("name", SIZES)
def test_a_size_that_is_none(name, value):
    message = rf"config\.json: {name} must be a whole number of at least 1; got "
    with pytest.raises(CheckpointError, match=message):
        read("llama", **{name: value})


@pytest.mark.parametrize("value", NO_NUMBERS, ids=str)
@pytest.mark.parametrize(
    ("model", "name"),
    [
        *(("llama", name) for name in ("rms_norm_eps", "rope_theta", "num_key_value_heads",
                                       "head_dim")),
        *(("gemma3", name) for name in (
            "rope_local_base_freq", "query_pre_attn_scalar", "attn_logit_softcapping",
            "final_logit_softcapping", "sliding_window", "sliding_window_pattern")),
    ],
)  # fmt: skip
def test_a_number_that_is_none(model, name, value):
    with pytest.raises(CheckpointError, match=rf"config\.json: {name} must be .*; got "):
        read(model, **{name: value})


@pytest.mark.parametrize("value", NO_NUMBERS, ids=str)
@pytest.mark.parametrize(
    "name", ["factor", "beta_fast", "attention_factor", "original_max_position_embeddings"]
)
def test_a_scaling_that_is_none(name, value):
    rope = {"rope_type": "yarn", "factor": 4.0, name: value}
    with pytest.raises(CheckpointError, match=rf"config\.json: {name} must be .*; got "):
        read("llama", rope_scaling=rope)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"num_key_value_heads": 4}, "num_heads must be a multiple of num_kv_heads; got 6 and 4"),
        ({"head_dim": 15}, "head_dim must be even; got 15"),
        ({"rope_scaling": {"type": "linear"}}, "field 'factor' is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "at least 1; got 0.5"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 0}},
         "original_max_position_embeddings > 0"),
        ({"rope_scaling": "linear"}, "config.json: "),
        ({"layer_types": ["full_attention"], "sliding_window": 4}, "one entry per layer"),
    ],
    ids=str,
)  # fmt: skip
def test_fields_that_contradict_each_other(fields, match):
    with pytest.raises(CheckpointError, match=match):
        read("mistral-window", **fields)


def test_all_families_are_written_here():
    families = {CONFIGS[name].family for name in ("llama", "qwen2", "qwen3", "gemma3")}
    assert set(FAMILIES.values()) == families
