"""Ranges of attention logits, found while a model runs."""

import dataclasses
import errno
import functools
import json
import os
from pathlib import Path
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.calibration import (
    BLOCK,
    LayerSoftmax,
    SoftmaxCalibration,
    calibrate_softmax,
    softmax_of_layers,
)
from jaxinfer.cli.calibrate import table
from jaxinfer.cli.main import main
from jaxinfer.llm import LLM
from jaxinfer.models.cache import PagedKVCache
from jaxinfer.models.config import DecoderConfig
from jaxinfer.models.decoder import Decoder
from jaxinfer.models.functions import forward
from jaxinfer.models.tokenizer.byte import byte_tokenizer
from jaxinfer.pallas_kernels.attention.api import attention
from jaxinfer.pallas_kernels.decode_attention.api import decode_attention
from jaxinfer.pallas_kernels.device import CPU, H100, use_device
from jaxinfer.pallas_kernels.dispatch import force_implementation
from jaxinfer.pallas_kernels.observe import notify, observe
from jaxinfer.sampling_params import SamplingParams
from tests.cli.command import run, write_tiny_model
from tests.ops.cases import normal

IDS = np.random.default_rng(0).integers(0, 256, 100)


@pytest.fixture(scope="module")
def model():
    return Decoder(DecoderConfig.tiny(), dtype=jnp.float32)


@pytest.fixture(scope="module")
def found(model):
    return calibrate_softmax(model, IDS, name="tiny", window=32)


def wide(model, factor: float):
    """The model with larger queries in layer 1."""
    config = model.config
    model = jax.tree.map(lambda x: x, model)
    weight = model.layers[1].attention.qkv_proj
    columns = jnp.arange(weight[...].shape[1]) < config.num_heads * config.head_dim
    weight[...] = weight[...] * jnp.where(columns, factor, 1.0)
    return model


def test_what_an_op_is_called_with_can_be_seen():
    seen = []
    arrays = [normal(i, (1, 5, 2, 8)) for i in range(3)]
    with observe("attention", lambda **call: seen.append(call)):
        attention(*arrays, is_causal=True, scale=0.5, implementation="xla")
        with observe("another", lambda **call: seen.append(None)):
            attention(*arrays, implementation="xla")
    attention(*arrays, implementation="xla")
    assert [call["scale"] for call in seen] == [0.5, 8**-0.5]
    assert seen[0]["query"] is arrays[0]
    assert seen[0]["visibility"].is_causal


def test_extremes_are_those_of_the_logits(model, found):
    """Against every query and key of every window, one by one."""
    found = calibrate_softmax(model, IDS, name="tiny", window=96)
    calls = []

    def forward_once(tokens):
        cache = PagedKVCache.create(model.config, batch_size=1, max_len=128, dtype=jnp.float32)
        forward(model, tokens, cache, fresh=True)

    with observe("attention", lambda **call: calls.append(call)):
        forward_once(jnp.asarray(IDS[None, :96], jnp.int32))
    assert (found.tokens, found.window, len(found.layers)) == (96, 96, 2)
    assert found.dtype == "float32"
    for number, layer in enumerate(found.layers):
        group = model.config.num_heads // model.config.num_kv_heads
        for head in range(model.config.num_heads):
            logits, rows, blocks = [], [], []
            for call in calls[number::2]:
                q = np.asarray(call["query"], np.float64)[0, :, head]
                k = np.asarray(call["key"], np.float64)[0, :, head // group]
                for t in range(96):
                    row = (q[t] @ k[: t + 1].T) * call["scale"]
                    logits += list(row)
                    rows.append(np.log(np.exp(row).sum()))
                    for i in range(0, t + 1, BLOCK):
                        blocks.append(np.log(np.exp(row[i : i + BLOCK]).sum()))
            got = [getattr(layer, name)[head] for name in ("low", "high", "sum_low", "sum_high")]
            want = [min(logits), max(logits), min(blocks), max(rows)]
            np.testing.assert_allclose(got, want, atol=1e-4)
            above, below = 80 * np.log(2) - (want[3] - layer.phi[head]), want[2] - layer.phi[head]
            assert above == pytest.approx(below + 60 * np.log(2), abs=1e-3)
            assert layer.inside[head] == 1.0
    assert all(layer.wide_heads("bfloat16") == () for layer in found.layers)


def test_heads_that_range_too_widely_are_named(model):
    layer = calibrate_softmax(wide(model, 3000.0), IDS, name="wide", window=32).layers[1]
    assert layer.wide_heads("float32")
    assert min(layer.inside) < 0.9
    for head in layer.wide_heads("float32"):
        assert layer.sum_high[head] - layer.sum_low[head] > 80


def test_a_text_shorter_than_the_window(model):
    found = calibrate_softmax(model, IDS[:5], name="short", window=512)
    assert (found.tokens, found.window) == (5, 5)


def test_progress_and_most_tokens(model):
    told = []
    calibrate_softmax(
        model, IDS, name="", window=16, max_tokens=50, progress=lambda *args: told.append(args)
    )
    assert told == [("calibrate", n, 48) for n in (16, 32, 48)]


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([], {}, "at least 2 tokens; got 0"),
        ([7], {}, "at least 2 tokens; got 1"),
        (IDS, {"max_tokens": 1}, "at least 2 tokens; got 1"),
        (IDS, {"window": 1}, "window must be 2 to 512 tokens; got 1"),
        (IDS, {"window": 513}, "window must be 2 to 512 tokens; got 513"),
    ],
)
def test_bad_arguments(model, ids, options, message):
    with pytest.raises(ValueError, match=message):
        calibrate_softmax(model, ids, name="", **options)


def test_a_divided_model_is_refused():
    model = Decoder(DecoderConfig.tiny(), dtype=jnp.float32, mesh="tensor=1")
    assert model.parallel is not None
    with pytest.raises(ValueError, match="needs a model on one device; this one is divided"):
        calibrate_softmax(model, IDS, name="")


def test_layers_that_were_not_seen_are_missed(model, monkeypatch):
    monkeypatch.setattr("jaxinfer.calibration._statistics", lambda *_: [])
    with pytest.raises(ValueError, match="only 0 of 2 layers showed their attention"):
        calibrate_softmax(model, IDS, name="")


def test_logits_that_are_not_finite_are_refused(model):
    with pytest.raises(ValueError, match="not finite"):
        calibrate_softmax(wide(model, float("inf")), IDS, name="", window=16)


def test_a_file_holds_all_of_it(found, tmp_path):
    found.save(tmp_path / "softmax.json")
    assert SoftmaxCalibration.load(tmp_path / "softmax.json") == found
    assert [path.name for path in tmp_path.iterdir()] == ["softmax.json"]


@pytest.fixture
def one_wide(found):
    """Of two layers, the second has a head that φ does not serve."""
    wide = dataclasses.replace(found.layers[1], sum_high=(99.0, *found.layers[1].sum_high[1:]))
    assert wide.wide_heads("float32") == (0,)
    return dataclasses.replace(found, layers=(found.layers[0], wide))


def test_the_verdict_is_in_the_file(one_wide, tmp_path):
    """Of every query head, and what a model that loads the file takes in every layer."""
    path = tmp_path / "softmax.json"
    one_wide.save(path)
    content = json.loads(path.read_text())
    assert content == json.loads(json.dumps({"format": 2} | one_wide.as_dict()))
    heads = len(one_wide.layers[0].phi)
    unified = [layer["unified"] for layer in content["layers"]]
    assert unified == [[True] * heads, [False] + [True] * (heads - 1)]
    assert [layer["softmax"] for layer in content["layers"]] == ["unified", "online"]
    assert softmax_of_layers(path, 2, "float32")[0] == ("unified", "online")
    assert SoftmaxCalibration.load(path) == one_wide


def test_a_file_without_a_verdict_is_read_as_before(one_wide, tmp_path):
    path = tmp_path / "softmax.json"
    path.write_text(json.dumps({"format": 2, **dataclasses.asdict(one_wide)}))
    assert "unified" not in path.read_text()
    assert SoftmaxCalibration.load(path) == one_wide
    assert softmax_of_layers(path, 2, "float32")[0] == ("unified", "online")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"softmax": "unified"}, "softmax must be online, by the numbers beside it; got unified"),
        ({"unified": True}, r"unified must be \[False, .*; got True: calibrate anew"),
    ],
)
def test_a_verdict_that_the_numbers_contradict_is_refused(one_wide, tmp_path, changes, message):
    path = tmp_path / "softmax.json"
    content = {"format": 2} | one_wide.as_dict()
    content["layers"][1].update(changes)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        SoftmaxCalibration.load(path)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": 1}', '{"format": 2, "layers": [{}]}', "[" * 100_000,
     '{"format": 2, "dtype": "bfloat16", "layers": [{"phi": [1' + "0" * 400 + "]}]}"],
    ids=["empty", "list", "object", "old", "no numbers", "nested", "long number"],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other.json is not a softmax calibration"):
        SoftmaxCalibration.load(path)


def test_the_table_names_wide_heads(found):
    one = LayerSoftmax(phi=(0.0, 0.0), low=(-3.0, -900.0), high=(2.0, 363.0), sum_low=(0.0, -9.0),
                       sum_high=(2.0, 363.0), inside=(1.0, 0.25))  # fmt: skip
    lines = table(dataclasses.replace(found, layers=(found.layers[0], one)))
    assert lines[1].endswith("unified")
    assert "-900.0 …   363.0" in lines[2]
    assert lines[2].endswith("25.00%  online: heads 1 range too widely")
    assert lines[3] == "one reference per head serves 1 of 2 layers"


def test_the_command(tmp_path):
    model = write_tiny_model(tmp_path / "model")
    text, out = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text("How vexingly quick daft zebras jump! " * 20)
    done = run("calibrate", "softmax", str(model), "--text", str(text), "--out", str(out),
               "--window", "64", "--max-tokens", "200")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "one reference per head serves 2 of 2 layers" in done.stdout
    assert done.stdout.endswith(f"192 of 740 tokens, in windows of 64; written to {out}\n")
    assert "calibrate: 192 tokens" in done.stderr
    assert SoftmaxCalibration.load(out).tokens == 192
    done = run("calibrate", "softmax", str(model), "--text", str(text), "--out", str(out), "--json")
    printed = json.loads(done.stdout)
    assert {"format": 2} | printed == json.loads(out.read_text())
    assert [layer["softmax"] for layer in printed["layers"]] == ["unified"] * 2
    assert [layer["unified"] for layer in printed["layers"]] == [[True] * 4] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--window", "1"), "--window and --max-tokens must be at least 2"),
        (("--max-tokens", "1"), "--window and --max-tokens must be at least 2"),
        (("--out", "no/such/folder/x.json"), "no/such/folder is not a folder"),
        (("--text", "missing.txt"), "cannot read missing.txt: No such file"),
    ],
)
def test_bad_input_of_the_command(options, message):
    text = () if "--text" in options else ("--text", "LICENSE")
    done = run("calibrate", "softmax", "default", *text, *options)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("text", "window", "message"),
    [
        ("some text", "513", "--window must be 2 to 512 tokens; got 513"),
        ("a", "64", "calibration needs a text of at least 2 tokens; got 1"),
    ],
)
def test_what_does_not_suit_the_model_is_refused_before_loading(
    tmp_path, capsys, monkeypatch, text, window, message
):
    model = str(write_tiny_model(tmp_path / "model"))
    monkeypatch.setattr("jaxinfer.cli.calibrate.load_weights", None)
    (tmp_path / "text").write_text(text)
    options = ["--text", str(tmp_path / "text"), "--out", str(tmp_path / "out")]
    assert main(["calibrate", "softmax", model, *options, "--window", window]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not (tmp_path / "out").exists()


def test_modes_of_a_model(found, model, tmp_path):
    none = (None,) * 3
    assert softmax_of_layers("online", 3, "float32") == (("online",) * 3, none)
    assert softmax_of_layers("unified", 3, "float32") == (("unified",) * 3, none)
    one = dataclasses.replace(found.layers[0], sum_high=(99.0,) * len(found.layers[0].phi))
    dataclasses.replace(found, layers=(found.layers[0], one)).save(tmp_path / "softmax.json")
    modes, phi = softmax_of_layers(tmp_path / "softmax.json", 2, "bfloat16")
    assert modes == ("unified", "online")
    assert phi == (found.layers[0].phi, None)
    other = model.with_softmax(modes, phi)
    assert [layer.attention.softmax for layer in other.layers] == list(modes)
    assert [layer.attention.phi for layer in other.layers] == list(phi)
    assert [layer.attention.softmax for layer in model.layers] == ["online"] * 2


def test_a_calibration_is_for_dtypes_of_one_range(found, tmp_path):
    found.save(tmp_path / "softmax.json")
    with pytest.raises(ValueError, match="is of a model in float32; this one runs in float16"):
        softmax_of_layers(tmp_path / "softmax.json", 2, jnp.float16)


def test_every_layer_gives_its_references_to_the_op(model, monkeypatch):
    asked = []

    def op(*arrays, softmax, phi, **options):
        asked.append((softmax, phi))
        return decode_attention(*arrays, softmax=softmax, phi=phi, **options)

    monkeypatch.setattr("jaxinfer.models.layers.decode_attention", op)
    heads = tuple(0.5 * head for head in range(model.config.num_heads))
    cache = PagedKVCache.create(model.config, batch_size=1, max_len=64, dtype=jnp.float32)
    forward(model.with_softmax(("unified", "unified"), (heads, None)), jnp.array([[5]]), cache)
    assert [softmax for softmax, _ in asked] == ["unified", "unified"]
    np.testing.assert_array_equal(asked[0][1], heads)
    assert asked[1][1] is None


@pytest.mark.parametrize(
    ("modes", "phi", "message"),
    [
        (("unified",) * 2, (None,), "phi must have an entry for 2 layers; got 1"),
        (("unified",) * 2, (None, (1.0,)), "phi of layer 1 must be one number for each of"),
        (("online",) * 2, ((1.0,) * 4, None), "phi of layer 0 .* got 4 for softmax='online'"),
    ],
)
def test_references_that_do_not_fit(model, modes, phi, message):
    with pytest.raises(ValueError, match=message):
        model.with_softmax(modes, phi)


@pytest.mark.parametrize(
    ("softmax", "layers", "message"),
    [
        ("fast", 2, "softmax must be online, unified or a calibration; there is no fast"),
        (".", 2, "softmax must be online, unified or a calibration; . is a folder"),
        ("softmax.json", 3, "softmax.json is of a model of 2 layers; this one has 3"),
    ],
)
def test_modes_that_do_not_fit(found, tmp_path, monkeypatch, softmax, layers, message):
    monkeypatch.chdir(tmp_path)
    found.save(tmp_path / "softmax.json")
    with pytest.raises(ValueError, match=message):
        softmax_of_layers(softmax, layers, "float32")


def test_the_engine_uses_and_counts(model, monkeypatch):
    """A softmax that always falls back once, in the layer that is unified."""
    asked = []

    def op(*arrays, softmax, phi, **options):
        assert phi is None
        asked.append(softmax)
        if softmax == "unified":
            notify("decode_attention", fallbacks=jnp.int32(1))
        return decode_attention(*arrays, softmax="online", **options)

    monkeypatch.setattr("jaxinfer.models.layers.decode_attention", op)
    llm = LLM((model.with_softmax(("online", "unified")), byte_tokenizer(eos_id=None)))
    plain = LLM((model, byte_tokenizer(eos_id=None)))
    params = SamplingParams(temperature=0, max_tokens=5)
    answers = [made.generate([[5, 6, 7]], params)[0].outputs[0].token_ids for made in (llm, plain)]
    assert answers[0] == answers[1]
    assert asked[:2] == ["online", "unified"]
    metrics = llm.engine.metrics
    assert metrics.softmax_fallbacks == metrics.decode_steps == 4
    assert plain.engine.metrics.softmax_fallbacks is None


def test_llm_takes_a_softmax(model, found, tmp_path, monkeypatch):
    """The references in the file, of every layer and head, are those that the op is called with."""
    asked, came = [], {}

    def op(*arrays, softmax, phi, **options):
        jax.debug.callback(functools.partial(came.__setitem__, len(asked)), phi)
        asked.append(softmax)
        return decode_attention(*arrays, softmax=softmax, phi=phi, **options)

    monkeypatch.setattr("jaxinfer.models.layers.decode_attention", op)
    found.save(tmp_path / "softmax.json")
    llm = LLM((model, byte_tokenizer(eos_id=None)), softmax=tmp_path / "softmax.json")
    output = llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=3))[0]
    assert len(output.outputs[0].token_ids) == 3
    jax.effects_barrier()
    assert asked == ["unified"] * 2
    written = json.loads((tmp_path / "softmax.json").read_text())["layers"]
    for number, layer in enumerate(written):
        np.testing.assert_array_equal(came[number], np.float32(layer["phi"]))
    with pytest.raises(ValueError, match="there is no fast"):
        LLM((model, byte_tokenizer(eos_id=None)), softmax="fast")
    with pytest.raises(ValueError, match=rf"calibration; {tmp_path} is a folder"):
        LLM((model, byte_tokenizer(eos_id=None)), softmax=tmp_path)
    monkeypatch.setattr(Path, "read_text", Mock(side_effect=PermissionError("no access")))
    with pytest.raises(OSError, match="no access"):
        LLM((model, byte_tokenizer(eos_id=None)), softmax=tmp_path / "softmax.json")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"batch_invariant": True}, "batch_invariant takes it"),
        ({"implementation": "decode_attention=xla"}, "it was asked for by name"),
        ({}, "decode_attention[mosaic] does not support device 'cpu'; supported: Hopper GPUs"),
    ],
)
def test_a_unified_softmax_that_is_not_run_is_said_once(model, caplog, options, why):
    """When the engine is made; and nothing is counted that does not happen."""
    params = SamplingParams(temperature=0, max_tokens=3)
    with caplog.at_level("WARNING", "jaxinfer"), use_device(CPU):
        plain = LLM((model, byte_tokenizer(eos_id=None)), **options)
        plain.generate([[5, 6]], params)
        assert not caplog.messages
        llm = LLM((model, byte_tokenizer(eos_id=None)), softmax="unified", **options)
        assert len(caplog.messages) == 1
        for prompts in ([[5, 6]], [[5, 6]] * 3):  # of another shape the second time
            llm.generate(prompts, params)
    [message] = caplog.messages
    assert message.startswith("the unified softmax is not run: xla serves, which is online")
    assert why in message
    assert llm.engine.metrics.softmax_fallbacks is None


def test_a_unified_softmax_that_is_run_is_no_warning(caplog):
    """Where the kernel would serve; and one that is kept from it later is said then."""
    model = Decoder(DecoderConfig.tiny(head_dim=64), dtype=jnp.bfloat16)
    with use_device(H100):
        llm = LLM((model, byte_tokenizer(eos_id=None)), softmax="unified", max_num_seqs=1)
    assert "unified" not in caplog.text
    caplog.clear()
    with use_device(H100), force_implementation("xla"):
        llm.generate([[5, 6]], SamplingParams(temperature=0, max_tokens=3))
    [message] = caplog.messages
    assert message.endswith("xla serves, which is online (it was asked for by name)")


def test_a_softmax_that_does_not_exist_is_refused_before_loading():
    done = run("generate", "Hi", "--softmax", "fast")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: --softmax must be online, unified or a calibration; there is no fast"
    ]


def test_a_folder_is_no_file_for_the_result(tmp_path, capsys):
    arguments = ["calibrate", "softmax", "/absent", "--text", __file__, "--out", str(tmp_path)]
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"error: {tmp_path} is a folder: name a file\n"


def test_a_result_that_cannot_be_written_is_refused_before_loading(found, capsys):
    out = "/proc/softmax.json"  # where root cannot make files either
    arguments = ["calibrate", "softmax", "/absent", "--text", __file__, "--out", out]
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"error: cannot write {out}: No such file or directory\n"
    with pytest.raises(OSError, match=rf"directory: '{out}'$"):
        found.save(Path(out))


def test_a_result_that_cannot_be_written_afterwards(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "scratch")

    opened = Mock(config=DecoderConfig.tiny()), byte_tokenizer()
    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr("jaxinfer.cli.calibrate.open_model", lambda *_: opened)
    monkeypatch.setattr("jaxinfer.cli.calibrate.load_weights", Mock())
    layers = SoftmaxCalibration(model="", dtype="float32", tokens=2, window=2, layers=())
    monkeypatch.setattr("jaxinfer.calibration.calibrate_softmax", lambda *_, **__: layers)
    out = str(tmp_path / "softmax.json")
    arguments = ["calibrate", "softmax", "default", "--text", __file__, "--out", out]
    assert main([*arguments, "--progress", "off"]) == 1
    assert capsys.readouterr().err == f"error: cannot write {out}: No space left on device\n"
    assert list(tmp_path.iterdir()) == []
