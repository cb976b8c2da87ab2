"""Measured choices: found, absent, damaged; of the package and of the user; and written."""

import dataclasses
import json
import logging

import pytest

from jaxinfer.cli.main import main
from jaxinfer.pallas_kernels import tuning
from jaxinfer.pallas_kernels.device import CPU, H100, H200, use_device

GOOD = {"format": 1, "command": "python -m bench tune", "entries": {"b1": {"block": 64}}}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Write the file of `op` for an H100: the package's, or the user's."""
    monkeypatch.setattr(tuning.resources, "files", lambda package: tmp_path)
    monkeypatch.setattr(tuning, "_ignored", set())
    monkeypatch.setattr(tuning, "_without", set())
    monkeypatch.setenv("JAXINFER_TUNING", str(tmp_path / "mine"))
    tuning.load.cache_clear()

    def write(text: str | bytes | dict, *, mine: bool = False):
        file = tmp_path / ("mine" if mine else "data") / H100.key / "op.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(GOOD | {"entries": text}) if isinstance(text, dict) else text
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return file

    yield write
    tuning.load.cache_clear()


def test_an_entry_is_found_by_key(data):
    file = data(json.dumps(GOOD))
    assert tuning.lookup("op", H100, "b1") == [(str(file), {"block": 64})]
    assert tuning.lookup("op", H100, "b2") == []


def test_no_file_at_all_is_one_warning_that_names_the_one_to_be_measured(data, caplog, tmp_path):
    for key in ("b1", "b1", "b2"):
        assert tuning.choice("op", H100, key, parse) is None
    assert tuning.choice("op", H200, "b1", parse) is None
    files = [tmp_path / folder / H100.key / "op.json" for folder in ("mine", "data")]
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("jaxinfer", logging.WARNING)
    assert record.getMessage() == (
        f"op has no tuning table for {H100.name} (there is no {files[0]} nor {files[1]}): a "
        "heuristic decides, and `jaxinfer tune MODEL` measures one"
    )
    tuning.lookup("other", H100, "b1")
    assert "other has no tuning table" in caplog.messages[1]


def test_without_a_folder_of_the_user_the_packages_file_is_missed(
    data, caplog, monkeypatch, tmp_path
):
    monkeypatch.setenv("JAXINFER_TUNING", "")
    tuning.lookup("op", H100, "b1")
    assert f"(there is no {tmp_path / 'data' / H100.key / 'op.json'}):" in caplog.text


@pytest.mark.parametrize("mine", [False, True])
def test_one_of_both_files_may_be_missing(data, caplog, mine):
    data({}, mine=mine)
    assert tuning.lookup("op", H100, "b1") == []
    assert not caplog.messages


def test_a_table_that_was_measured_meanwhile_is_not_missed(data, caplog, tmp_path):
    with tuning.being_made():
        assert tuning.lookup("op", H100, "b1") == []
    tuning.save(tmp_path / "mine", "op", H100, {"b1": {"block": 64}}, "jaxinfer tune x")
    assert tuning.choice("op", H100, "b1", parse) == 32
    assert not caplog.messages


@pytest.mark.parametrize("device", [CPU, dataclasses.replace(H100, name="A100", capability=80)])
def test_devices_without_choices_need_no_table(data, caplog, device):
    assert tuning.lookup("op", device, "b1") == []
    assert not caplog.messages


def test_who_makes_a_table_does_not_miss_it(data, caplog):
    with tuning.being_made():
        tuning.lookup("op", H100, "b1")
    assert not caplog.messages
    tuning.lookup("op", H100, "b1")
    assert len(caplog.messages) == 1


def test_commands_that_measure_nothing_miss_it(data, caplog, capsys):
    """The command line reads all commands, but loads what measures only where it is asked to."""
    data(json.dumps(GOOD))  # of another op
    with use_device(H100):
        assert main(["info"]) == 0
    capsys.readouterr()
    ops = {message.split()[0] for message in caplog.messages if "no tuning table" in message}
    assert ops == {"matmul", "decode_attention"}


DAMAGED = {
    "no json": "{",
    "nested without end": "[" * 100_000,
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
    assert tuning.lookup("op", H100, "b1") == []
    assert tuning.lookup("op", H100, "b2") == []
    (record,) = caplog.records  # once, not for each call
    assert record.levelno == logging.WARNING
    assert str(file) in record.getMessage()


def test_the_message_says_what_is_wrong(data, caplog):
    tuning.load(data(json.dumps(GOOD | {"format": 2})))
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


def test_entries_of_the_user_count_first(data):
    data({"b1": {"block": 64}, "b2": {"block": 128}})
    data({"b1": {"block": 2}, "b3": {"block": 4}}, mine=True)
    assert [tuning.choice("op", H100, key, parse) for key in ("b1", "b2", "b3")] == [1, 64, 2]


def test_without_a_folder_of_the_user_the_package_decides(data, monkeypatch):
    data({"b1": {"block": 64}})
    data({"b1": {"block": 2}}, mine=True)
    monkeypatch.setenv("JAXINFER_TUNING", "")
    assert tuning.choice("op", H100, "b1", parse) == 32


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_where_the_users_file_is_damaged_the_packages_decides(data, caplog, text):
    data({"b1": {"block": 64}})
    file = data(text, mine=True)
    assert tuning.choice("op", H100, "b1", parse) == 32
    (record,) = caplog.records
    assert str(file) in record.getMessage()


def test_where_an_entry_of_the_user_is_damaged_the_packages_decides(data, caplog):
    data({"b1": {"block": 64}})
    file = data({"b1": {"block": "x"}}, mine=True)
    assert tuning.choice("op", H100, "b1", parse) == 32
    (record,) = caplog.records
    assert str(file) in record.getMessage()


def test_what_is_saved_is_found_beside_what_was_there(data, tmp_path):
    file = data({"b1": {"block": 64}, "b2": {"block": 128}}, mine=True)
    assert tuning.choice("op", H100, "b1", parse) == 32
    saved = tuning.save(tmp_path / "mine", "op", H100, {"b1": {"block": 4}}, "jaxinfer tune x")
    assert saved == file
    assert [tuning.choice("op", H100, key, parse) for key in ("b1", "b2")] == [2, 64]
    assert json.loads(file.read_text())["command"] == "jaxinfer tune x"
    assert list(file.parent.iterdir()) == [file]


def test_an_interrupted_write_leaves_the_old_file(data, tmp_path, monkeypatch):
    file = data({"b1": {"block": 64}}, mine=True)
    before = file.read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tuning.save(tmp_path / "mine", "op", H100, {"b1": {"block": 4}}, "")
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_a_damaged_file_is_replaced_with_a_warning(data, tmp_path, caplog):
    file = data("{", mine=True)
    tuning.save(tmp_path / "mine", "op", H100, {"b1": {"block": 4}}, "")
    aside = file.with_suffix(".damaged")
    assert f"{file} is damaged; it is now {aside}" in caplog.text
    assert aside.read_text() == "{"
    assert tuning.choice("op", H100, "b1", parse) == 2


def test_a_file_of_another_format_is_left_alone(data, tmp_path):
    file = data({"b1": {"block": 64}}, mine=True)
    text = file.read_text().replace('"format": 1', '"format": 2')
    file.write_text(text)
    with pytest.raises(ValueError, match=r"has format 2, .* writes 1: move the file away"):
        tuning.save(tmp_path / "mine", "op", H100, {"b1": {"block": 4}}, "")
    assert file.read_text() == text


def test_a_table_can_be_made_anew(data, tmp_path):
    data({"b1": {"block": 64}, "b2": {"block": 128}}, mine=True)
    tuning.save(tmp_path / "mine", "op", H100, {"b1": {"block": 4}}, "", keep=False)
    assert [tuning.choice("op", H100, key, parse) for key in ("b1", "b2")] == [2, None]
