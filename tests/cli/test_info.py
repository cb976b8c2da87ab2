"""What `jaxinfer info` reports."""

import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp
import pytest

from jaxinfer import default_model
from jaxinfer.cli.main import main
from jaxinfer.models.config import DecoderConfig
from jaxinfer.op_choices import check_implementation, op_choices
from jaxinfer.pallas_kernels.device import CPU, H100, use_device
from jaxinfer.pallas_kernels.dispatch import NotSupported, choose, explain


def by_name(choices):
    return {(choice.op, choice.phase): choice for choice in choices}


def test_every_op_of_the_model_has_a_choice_on_this_machine():
    choices = by_name(op_choices(DecoderConfig.llama3_8b(), CPU, jnp.float32))
    assert {
        ("attention", "prefill"), ("attention", "chunked prefill"),
        ("decode_attention", "decode"), ("rope_kv_write", "decode"),
    } <= set(choices)  # fmt: skip
    joined = choices.pop(("project_rope_write", "decode"))  # an op each, chosen below
    assert (joined.implementation, joined.certain) == ("separate", True)
    for choice in choices.values():
        assert choice.implementation == "xla"
        assert choice.certain
        for verdict in choice.verdicts:
            assert bool(verdict.reason) == (verdict.implementation != "xla")


def test_a_model_can_be_planned_again():
    """JAX does not trace a function twice for the same shapes, but the plan has to."""
    config = DecoderConfig.tiny()
    first = op_choices(config, H100, jnp.bfloat16)
    assert ("decode_attention", "decode") in by_name(first)
    assert op_choices(config, H100, jnp.bfloat16) == first
    assert by_name(op_choices(config, CPU, jnp.bfloat16)).keys() == by_name(first).keys()


@pytest.mark.parametrize("name", ["mosaic", "flash_attn3", "tokamax"])
def test_no_whole_model_can_be_forced_to_what_serves_some_calls(name):
    """Not even where it is at home."""
    with use_device(H100), pytest.raises(ValueError, match="or single ops as in 'matmul=xla'"):
        check_implementation(name, DecoderConfig.llama3_8b(), jnp.bfloat16)


def test_single_ops_can_be_forced():
    config = DecoderConfig.llama3_8b()
    with use_device(H100):
        check_implementation("matmul=xla, decode_attention=mosaic", config, jnp.bfloat16)
        for name, message in {
            "matmul=cudnn": "implementation of matmul must be one of mosaic, xla; got 'cudnn'",
            "softmax=xla": "must name one of the ops .*matmul.*; got 'softmax'",
            "matmul=mosaic": "'mosaic' of matmul cannot serve the model here: matmul.*'matmul=xla'",
            "matmul=": "op=name with commas",
            "=xla": "op=name with commas",
        }.items():
            with pytest.raises(ValueError, match=message):
                check_implementation(name, config, jnp.bfloat16)


def test_a_whole_model_is_checked_once(monkeypatch):
    """By the command line before weights are read, and by `LLM` when it is made."""
    asked = []
    monkeypatch.setattr(
        "jaxinfer.op_choices.op_choices", lambda *a: asked.append(a) or op_choices(*a)
    )
    config = DecoderConfig.tiny(num_layers=3)
    for dtype in ("float32", jnp.dtype("float32")):
        check_implementation("xla", config, dtype)
    assert len(asked) == 1
    with use_device(H100):
        check_implementation("xla", config, "float32")
    assert len(asked) == 2


def test_plan_for_another_device():
    choices = by_name(op_choices(DecoderConfig.llama3_8b(), H100, jnp.bfloat16))
    decode = choices["decode_attention", "decode"]
    assert decode.implementation == "mosaic"
    assert decode.certain


def test_reasons_name_the_argument():
    """A head size that the kernel lacks."""
    config = DecoderConfig.tiny(head_dim=32)
    choices = by_name(op_choices(config, H100, jnp.bfloat16))
    decode = choices["decode_attention", "decode"]
    assert decode.implementation == "xla"
    (mosaic,) = [v for v in decode.verdicts if v.implementation == "mosaic"]
    assert "head_dim 32" in mosaic.reason


def test_layers_of_both_kinds_are_planned():
    config = DecoderConfig.tiny(
        num_layers=4, sliding_window=16, local_layers=(True, True, False, True)
    )
    assert len(op_choices(config, CPU, jnp.float32)) >= 4


def test_nothing_is_computed(monkeypatch):
    """Llama-3-8B's weights would not fit many machines that ask."""
    before = len(jax.live_arrays())
    op_choices(DecoderConfig.llama3_8b(), CPU, jnp.float32)
    assert len(jax.live_arrays()) - before < 20


def test_json(capsys):
    assert main(["info", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["packages"]["jax"] == jax.__version__
    assert values["devices"][0]["platform"] == jax.devices()[0].platform
    assert values["plan"]["ops"]
    assert values["default_model"]["path"].endswith(".gguf")


@pytest.mark.parametrize(
    ("content", "fetched", "damaged", "said"),
    [
        (b"model", True, False, "is here"),
        (b"mod", False, True, "is damaged (its size or checksum is wrong): delete it, or"),
        (b"modem", False, True, "is damaged (its size or checksum is wrong): delete it, or"),
        (None, False, False, "not fetched yet"),
    ],
)
def test_the_default_model_is_whole_damaged_or_absent(
    tmp_path, monkeypatch, capsys, content, fetched, damaged, said
):
    sha256 = hashlib.sha256(b"model").hexdigest()
    model = dataclasses.replace(default_model.DEFAULT_MODEL, size=5, sha256=sha256)
    monkeypatch.setattr(default_model, "DEFAULT_MODEL", model)
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path))
    if content is not None:
        model.path.parent.mkdir()
        model.path.write_bytes(content)
    assert main(["info"]) == 0
    assert f"\ndefault model SmolLM2-135M-Instruct: {said}" in capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["default_model"]
    assert (found["fetched"], found["damaged"]) == (fetched, damaged)


def test_text_for_a_model_and_a_device(capsys, tiny):
    assert main(["info", "--device", "h100", "--model", tiny]) == 0
    out = capsys.readouterr().out
    assert "on NVIDIA H100 80GB HBM3 (not this machine's)" in out
    assert "head_dim 16" in out
    assert "taken" in out


def test_explain_asks_everyone_and_still_answers():
    def refuse():
        raise NotSupported("op", "fast", "dtype float32", "bfloat16")

    def broken():
        raise RuntimeError("no driver")

    candidates = {"named": lambda: 3, "fast": refuse, "broken": broken, "plain": lambda: 2}
    with explain() as verdicts:
        assert choose("op", None, candidates, ("fast", "broken", "plain")) == 2
    assert [(v.implementation, v.rank, v.certain) for v in verdicts] == [
        ("fast", 0, True), ("broken", 1, False), ("plain", 2, True), ("named", None, True),
    ]  # fmt: skip
    assert "dtype float32" in verdicts[0].reason
    assert verdicts[1].reason == "no driver"
    with pytest.raises(ExceptionGroup), explain():
        choose("op", None, {"fast": refuse}, ("fast",))
