"""The shape of a decoder: what it derives, and what it refuses."""

import dataclasses

import pytest

from jaxinfer.models.config import DecoderConfig
from jaxinfer.models.weights import weight_shapes
from tests.models.families import CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_the_matrices(name):
    config = CONFIGS[name]
    shapes = weight_shapes(config).values()
    assert config.num_parameters == sum(s[0] * s[1] for s in shapes if len(s) == 2)


@pytest.mark.parametrize(
    ("made", "billions"), [(DecoderConfig.llama2_7b(), 6.74), (DecoderConfig.llama3_8b(), 8.03)]
)
def test_known_models(made, billions):
    assert made.num_parameters / 1e9 == pytest.approx(billions, abs=0.01)


def test_windows_and_scale():
    config = CONFIGS["gemma3"]
    assert [config.window(i) for i in range(4)] == [5, 5, None, 5]
    assert DecoderConfig.tiny().window(0) is None
    assert DecoderConfig.tiny().scale == 0.25
    assert DecoderConfig.tiny(attention_scale=0.5).scale == 0.5


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        *(({name: 0}, f"{name} must be positive; got 0") for name in
          ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
           "intermediate_size", "max_position_embeddings")),
        ({"num_kv_heads": 3}, "multiple of num_kv_heads; got 4 and 3"),
        ({"head_dim": 15}, "head_dim must be even; got 15"),
        ({"local_layers": (True,), "sliding_window": 4}, r"one entry per layer \(2\); got 1"),
        ({"local_layers": (True, False)}, "local_layers need a sliding_window"),
        *(({"rms_norm_eps": value}, "rms_norm_eps must be finite and not negative; got")
          for value in (-1e-6, float("nan"), float("inf"))),
        *(({name: value}, f"{name} must be finite and positive; got")
          for name in ("rope_theta", "local_rope_theta")
          for value in (0.0, -1.0, float("nan"), float("inf"))),
    ],
    ids=str,
)  # fmt: skip
def test_bad_fields(fields, match):
    with pytest.raises(ValueError, match=match):
        DecoderConfig.tiny(**fields)


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_activation():
    with pytest.raises(ValueError, match="silu or gelu_tanh; got 'relu'"):
        DecoderConfig.tiny(activation="relu")


def test_unknown_fields_are_refused_by_name():
    with pytest.raises(TypeError, match="head_size"):
        DecoderConfig.tiny(head_size=3)


def test_it_is_static_under_jit():
    config = DecoderConfig.tiny()
    assert hash(config) == hash(DecoderConfig.tiny())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_layers = 3  # type: ignore[misc]
