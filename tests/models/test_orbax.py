"""Converted models: what is written is read back, or nothing is there."""

import dataclasses
import errno
import json
import os
import shutil
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.models.checkpoint import orbax, orbax_write
from jaxinfer.models.checkpoint.base import GenerationDefaults
from jaxinfer.models.checkpoint.open import load_model, open_checkpoint
from jaxinfer.models.checkpoint.orbax import FILE, OrbaxCheckpoint, check_target, save_orbax
from jaxinfer.models.decoder import Decoder
from jaxinfer.models.errors import CheckpointError
from jaxinfer.models.tokenizer.byte import byte_tokenizer
from jaxinfer.models.tokenizer.tokenizer import Tokenizer
from tests.models.families import CONFIGS, random_model, random_weights
from tests.models.logits import TOKENS, read_logits


# Biases, norms of both kinds, and every form of rope scaling.
@pytest.mark.parametrize("name", ["qwen2", "gemma3", "llama-llama3", "llama-yarn-factor"])
def test_round_trip_to_the_bit(name, tmp_path):
    save_orbax(tmp_path / "model", random_model(name))
    opened = open_checkpoint(tmp_path / "model")
    assert isinstance(opened, OrbaxCheckpoint)
    assert opened.config == CONFIGS[name]
    model = load_model(opened, dtype=jnp.float32)
    for (key, got), (other, want) in zip(
        model.canonical_weights(), random_model(name).canonical_weights(), strict=True
    ):
        assert key == other
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(want, random_weights(name)[key])


def test_bfloat16_stays_bfloat16(tmp_path):
    model = Decoder(CONFIGS["llama"], dtype=jnp.bfloat16)
    save_orbax(tmp_path / "model", model)
    opened = open_checkpoint(tmp_path / "model")
    got = opened.read("layers.0.q_proj")
    assert got.dtype == jnp.bfloat16
    want = dict(model.canonical_weights())["layers.0.q_proj"]
    np.testing.assert_array_equal(got, np.asarray(want))
    # Each weight is forgotten when it is given out; asking again reads again.
    np.testing.assert_array_equal(opened.read("layers.0.q_proj"), got)


def test_defaults_and_tokenizer_come_along(tmp_path):
    generation = GenerationDefaults(eos_token_ids=(3, 7), sampling={"temperature": 0.6, "top_k": 9})
    words = byte_tokenizer(eos_id=3, special_tokens={"eos_token": "$"})
    model = Decoder(dataclasses.replace(CONFIGS["llama"], vocab_size=256))
    save_orbax(tmp_path / "model", model, tokenizer=words, generation=generation)
    opened = open_checkpoint(tmp_path / "model")
    assert opened.generation == generation
    again = opened.tokenizer()
    assert again.encode("héllo\n") == words.encode("héllo\n")
    assert (again.bos_id, again.add_bos, again.eos_ids) == (None, False, (3,))
    assert again.chat_template == words.chat_template


def test_the_target_must_not_exist(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(FileExistsError, match="model exists; remove it or choose another name"):
        save_orbax(tmp_path / "model", random_model("llama"))
    assert list((tmp_path / "model").iterdir()) == []


def test_somebody_else_was_quicker(tmp_path, monkeypatch):
    """Two conversions to one place: the first stays, and the other says so."""
    write = orbax._write

    def late(*arguments):
        write(*arguments)
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "first").touch()

    monkeypatch.setattr(orbax, "_write", late)
    with pytest.raises(FileExistsError, match="model exists; remove it or choose another name"):
        save_orbax(tmp_path / "model", random_model("llama"))
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "first"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, RuntimeError])
def test_an_error_while_writing_leaves_nothing(error, tmp_path, monkeypatch):
    """Weights are on the disk already when the tokenizer fails."""

    def fail(_, folder):
        assert any(folder.rglob("*"))
        raise error

    monkeypatch.setattr(Tokenizer, "save", fail)
    with pytest.raises(error):
        save_orbax(tmp_path / "deep" / "model", random_model("llama"), tokenizer=byte_tokenizer())
    assert list((tmp_path / "deep").iterdir()) == []


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("RESOURCE_EXHAUSTED: Failed writing [os_error_code='28']", errno.ENOSPC),
        ("RESOURCE_EXHAUSTED: Failed writing", errno.ENOSPC),
        ("OUT_OF_RANGE: Failed to write 9 bytes [os_error_code='27']", errno.EFBIG),
        ("INVALID_ARGUMENT: rank", None),
    ],
)
def test_errors_of_the_disk_name_the_target(message, code, tmp_path, monkeypatch):
    """Those of TensorStore too, which are ValueErrors about a scratch file."""
    import orbax.checkpoint as ocp

    def fail(*_, **__):
        raise ValueError(message)

    monkeypatch.setattr(ocp.PyTreeCheckpointer, "save", fail)
    with pytest.raises((OSError, ValueError)) as raised:
        save_orbax(tmp_path / "model", random_model("llama"))
    if code is None:
        assert str(raised.value) == message
    else:
        assert isinstance(raised.value, OSError)
        assert (raised.value.errno, raised.value.filename) == (code, str(tmp_path / "model"))
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"Not a directory: '.*/file/model'"):
        check_target(tmp_path / "file" / "model")
    check_target(tmp_path / "deep" / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_threads_still_write_is_removed(tmp_path):
    """And only their reports are kept from standard error."""
    folder = tmp_path / "scratch"
    before, shown = sys.unraisablehook, []

    class Noisy:
        def __init__(self, error: Exception):
            self.error = error

        def __del__(self):
            raise self.error

    def write() -> None:
        for _ in range(10):
            folder.mkdir(exist_ok=True)
            Noisy(RuntimeError("Event loop is closed"))
            time.sleep(0.05)
        Noisy(RuntimeError("another"))

    sys.unraisablehook = lambda report: shown.append(str(report.exc_value))
    try:
        with orbax_write._Writers() as writers:
            thread = threading.Thread(target=write)
            thread.start()
            writers.remove_what_they_write(folder)
            thread.join(timeout=0)
            assert not thread.is_alive()
    finally:
        sys.unraisablehook = before
    assert not folder.exists()
    assert shown == ["another"]


def test_a_hook_that_was_put_in_place_while_writing_stays(monkeypatch):
    """An end of the process hushes what it cut off, and that is dropped only later."""
    hushed, before = (lambda _: None), sys.unraisablehook
    monkeypatch.setattr(sys, "unraisablehook", before)
    with orbax_write._Writers():
        pass
    assert sys.unraisablehook is before
    with orbax_write._Writers():
        sys.unraisablehook = hushed
    assert sys.unraisablehook is hushed


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A converted llama, to be copied."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_orbax(folder, random_model("llama"))
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def change(folder, **fields):
    values = json.loads((folder / FILE).read_text()) | fields
    (folder / FILE).write_text(json.dumps(values))


def test_it_may_be_moved(copy, monkeypatch):
    """Also named by a relative path; Orbax alone wants absolute ones."""
    monkeypatch.chdir(copy.parent)
    assert read_logits(open_checkpoint("model")).shape == (len(TOKENS), 97)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"format": 2}, "format 2 is unknown; expected 1"),
        ({"format": None}, "format None is unknown"),
        ({"config": {}}, FILE),
        ({"config": None}, FILE),
        ({"generation": []}, FILE),
        ({"generation": {"eos_token_ids": ["x"], "sampling": {}}},
         rf"{FILE}: eos_token_ids must be a token id or a list of them; got \['x'\]"),
        ({"generation": {"eos_token_ids": [], "sampling": {"top_k": -3}}},
         rf"{FILE}: top_k must be a whole number of at least -1; got -3"),
        ({"weights_bytes": [1]}, FILE),
        ({"weights_bytes": {"absent": 1}}, "absent is missing"),
    ],
)  # fmt: skip
def test_a_description_that_is_wrong(fields, match, copy):
    change(copy, **fields)
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(copy)


def test_filters_without_a_temperature_sample(copy):
    """As in directories that were converted when the temperature was not written."""
    change(copy, generation={"eos_token_ids": [], "sampling": {"top_k": 64}})
    assert open_checkpoint(copy).generation.sampling == {"temperature": 1.0, "top_k": 64}


def test_a_field_that_is_unknown(copy):
    config = json.loads((copy / FILE).read_text())["config"]
    change(copy, config=config | {"colour": "red"})
    with pytest.raises(CheckpointError, match="colour"):
        open_checkpoint(copy)


def test_a_shape_that_is_another(copy):
    config = json.loads((copy / FILE).read_text())["config"]
    change(copy, config=config | {"num_layers": 3})
    with pytest.raises(CheckpointError, match=r"weight layers\.2\.\w+ is missing"):
        load_model(open_checkpoint(copy))
    change(copy, config=config | {"hidden_size": 24})
    with pytest.raises(CheckpointError, match=r"embed must have shape \(97, 24\); got \(97, 48\)"):
        load_model(open_checkpoint(copy))


def test_every_file_is_missed(saved, tmp_path):
    """Taken away or cut by one byte, each is named before Orbax sees it."""
    files = [path.relative_to(saved) for path in saved.rglob("*") if path.is_file()]
    assert len(files) > 4
    for i, file in enumerate(files):
        copy = shutil.copytree(saved, tmp_path / f"{i}")
        path = copy / file
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(CheckpointError, match=file.name):
            open_checkpoint(copy)
        path.unlink()
        with pytest.raises(CheckpointError, match=file.name if file.name != FILE else "no model"):
            open_checkpoint(copy)


def test_bytes_that_are_wrong(saved, tmp_path):
    """As long as it was, but with another bit: Orbax would read most of them without an error."""
    files = [p.relative_to(saved) for p in (saved / "weights").rglob("*") if p.is_file()]
    for i, file in enumerate(files):
        copy = shutil.copytree(saved, tmp_path / f"{i}")
        data = bytearray((copy / file).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / file).write_bytes(data)
        with pytest.raises(CheckpointError, match=f"{file.name}: corrupt: its checksum"):
            load_model(open_checkpoint(copy))


def test_no_tokenizer(copy):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        open_checkpoint(copy).tokenizer()
