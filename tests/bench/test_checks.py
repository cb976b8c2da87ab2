"""What is refused before anything is measured."""

import re

import jax
import pytest

from bench.checks import check_devices, check_json
from bench.cli import main
from bench.rows import save
from jaxinfer.sharding.mesh import make_mesh
from tests.bench.fakes import row


def test_devices_are_counted_in_the_words_of_a_mesh():
    with pytest.raises(ValueError, match="needs 4096 devices") as of_mesh:
        make_mesh("seq=4096")
    with pytest.raises(ValueError, match="needs 4096 devices") as ours:
        check_devices(4096)
    assert str(ours.value) == str(of_mesh.value).replace("mesh 'seq=4096'", "--devices 4096")


def test_one_device_is_too_few_for_any_number():
    one = jax.devices()[:1]
    with pytest.raises(ValueError, match=r"^ring_attention needs 2 or more devices; there is 1"):
        check_devices(None, one)
    check_devices(None, one * 2)
    check_devices(2, one * 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no JSON list of rows: Expecting value"),
        ("my notes\n", "no JSON list of rows: Expecting value"),
        ('{"rows": []}', "JSON, but no list of rows with op, case, implementation"),
        ("[1, 2]", "JSON, but no list of rows"),
        ('[{"op": "attention", "case": 3, "implementation": "xla"}]', "JSON, but no list of rows"),
        (b"\xff\xfe\x00", "no JSON list of rows, nor any text"),
    ],
)
def test_a_file_of_something_else_is_left_alone(text, message, tmp_path):
    path = tmp_path / "notes"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = path.read_bytes()
    with pytest.raises(ValueError, match=re.escape(f"--json {path}: {message}")):
        check_json(path)
    assert path.read_bytes() == before


def test_a_folder_is_not_made(tmp_path, capsys):
    path = tmp_path / "new" / "rows.json"
    assert main(["run", "--op", "add_rms_norm", "--tag", "ci", "--json", str(path)]) == 2
    shown = capsys.readouterr()
    assert shown.err == f"error: --json {path}: there is no folder {path.parent}\n"
    assert shown.out == ""
    assert not path.parent.exists()


def test_what_is_no_file_is_not_replaced(tmp_path):
    with pytest.raises(ValueError, match="not a file"):
        check_json(tmp_path)
    path = tmp_path / "null"
    path.symlink_to("/dev/null")
    with pytest.raises(ValueError, match="not a file"):
        check_json(path)


def test_rows_and_no_file_are_taken(tmp_path):
    path = tmp_path / "rows.json"
    check_json(path)
    save(path, [row("a", "xla", 1.0)])
    check_json(path)
    path.write_text("[]")
    check_json(path)
