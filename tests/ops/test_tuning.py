"""Measured choices: found, absent, damaged."""

import json
import logging

import pytest

from jaxinfer.pallas_kernels import tuning
from jaxinfer.pallas_kernels.device import H100

GOOD = {"format": 1, "command": "python -m bench tune", "entries": {"b1": {"block": 64}}}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Write the file of `op` for an H100."""
    monkeypatch.setattr(tuning.resources, "files", lambda package: tmp_path)
    monkeypatch.setattr(tuning, "_ignored", set())
    tuning.load.cache_clear()
    folder = tmp_path / "data" / H100.key
    folder.mkdir(parents=True)

    def write(text: str | bytes):
        file = folder / "op.json"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return file

    yield write
    tuning.load.cache_clear()


def test_an_entry_is_found_by_key(data):
    data(json.dumps(GOOD))
    assert tuning.lookup("op", H100, "b1") == {"block": 64}
    assert tuning.lookup("op", H100, "b2") is None


def test_a_missing_file_is_normal(data, caplog):
    assert tuning.lookup("op", H100, "b1") is None
    assert not caplog.messages


DAMAGED = {
    "no json": "{",
    "binary": b"\xff\xfe\x00",
    "a list": "[]",
    "a number": "3",
    "no format": json.dumps({"entries": {}}),
    "another format": json.dumps(GOOD | {"format": 2}),
    "no entries": json.dumps({"format": 1}),
    "entries that are none": json.dumps(GOOD | {"entries": 3}),
    "entries by position": json.dumps(GOOD | {"entries": [{"block": 64}]}),
    "an entry that is none": json.dumps(GOOD | {"entries": {"b1": 64}}),
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_a_warning_that_names_it(data, caplog, text):
    file = data(text)
    assert tuning.lookup("op", H100, "b1") is None
    assert tuning.lookup("op", H100, "b2") is None
    (record,) = caplog.records  # once, not for each call
    assert record.levelno == logging.WARNING
    assert str(file) in record.getMessage()


def test_the_message_says_what_is_wrong(data, caplog):
    data(json.dumps(GOOD | {"format": 2}))
    tuning.load("op", H100.key)
    assert "format must be 1; got 2" in caplog.text


def parse(entry):
    return entry["block"] // 2


def test_an_entry_is_parsed(data):
    data(json.dumps(GOOD))
    assert tuning.choice("op", H100, "b1", parse) == 32
    assert tuning.choice("op", H100, "b2", parse) is None


@pytest.mark.parametrize("entry", [{}, {"block": "64"}], ids=str)
def test_a_damaged_entry_is_one_warning_that_names_file_and_key(data, caplog, entry):
    file = data(json.dumps(GOOD | {"entries": {"b1": entry, "b2": {"block": 2}}}))
    for _ in range(2):
        assert tuning.choice("op", H100, "b1", parse) is None
    assert tuning.choice("op", H100, "b2", parse) == 1
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"ignoring entry 'b1' of tuning data {file} (" in record.getMessage()


def test_errors_of_another_kind_are_not_swallowed(data):
    data(json.dumps(GOOD))
    with pytest.raises(ZeroDivisionError):
        tuning.choice("op", H100, "b1", lambda entry: 1 // 0)
