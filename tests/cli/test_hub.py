"""From a model's name to its files."""

import importlib.util
import sys
import types

import pytest

from jaxinfer import hub
from jaxinfer.default_model import DownloadError
from jaxinfer.hub import resolve_model
from jaxinfer.models.errors import CheckpointError


class FakeHub(types.ModuleType):
    """Stands for huggingface_hub; records what is asked for."""

    def __init__(self, folder):
        super().__init__("huggingface_hub")
        self.folder, self.calls = folder, []

    def snapshot_download(self, repo, *, revision, allow_patterns):
        self.calls.append((repo, revision, allow_patterns))
        return str(self.folder)

    def hf_hub_download(self, repo, file, *, revision):
        self.calls.append((repo, file, revision))
        return str(self.folder / file)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    module = FakeHub(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name == "huggingface_hub" or find(name)
    )
    return module


def test_existing_paths_win(tmp_path, fake):
    file = tmp_path / "model.gguf"
    file.write_text("")
    assert resolve_model(file) == file
    assert resolve_model(str(tmp_path)) == tmp_path
    assert fake.calls == []


def test_default_is_fetched(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "fetch_default_model", lambda progress: tmp_path / "default.gguf")
    assert resolve_model("default").name == "default.gguf"


@pytest.mark.parametrize(
    "name", ["", "no-such-thing", "./a/b", "/a/b", "a/b/c/d", "dir/model.gguf", "own er/name"]
)
def test_neither_path_nor_id(name, fake):
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve_model(name)
    assert fake.calls == []


def test_hub_id_fetches_only_what_is_needed(fake, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model("owner/name@v1.0") == tmp_path
    ((repo, revision, patterns),) = fake.calls
    assert (repo, revision) == ("owner/name", "v1.0")
    assert "model*.safetensors" in patterns
    assert "tokenizer.json" in patterns
    assert not any("bin" in pattern or pattern == "*" for pattern in patterns)


def test_only_the_configuration_of_a_repository(fake, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model("owner/name@v1", config_only=True) == tmp_path
    assert fake.calls == [("owner/name", "v1", ["config.json"])]


def test_hub_file(fake, tmp_path):
    assert resolve_model("owner/name/part/q4.gguf") == tmp_path / "part" / "q4.gguf"
    assert fake.calls == [("owner/name", "part/q4.gguf", None)]


def test_hub_repository_without_config(fake):
    with pytest.raises(CheckpointError, match=r"owner/name/FILE\.gguf"):
        resolve_model("owner/name")


def test_hub_failure_is_one_line(fake):
    def fail(*_, **__):
        raise OSError("404 Client Error.\n\nRepository Not Found.\nMore advice.")

    fake.snapshot_download = fail
    with pytest.raises(DownloadError) as raised:
        resolve_model("owner/name")
    assert str(raised.value).endswith("404 Client Error")


def test_a_hub_that_is_not_reached(fake):
    """As huggingface-hub tells of it."""

    def fail(*_, **__):
        raise OSError("Got: ConnectError: Name or service not known\nAn error happened.")

    fake.snapshot_download = fail
    with pytest.raises(DownloadError, match=r"Face Hub: ConnectError: Name or service not known$"):
        resolve_model("owner/name")


def test_without_the_package_the_extra_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "huggingface_hub" else find(name),
    )
    with pytest.raises(DownloadError, match="pip install huggingface-hub"):
        resolve_model("owner/name")


def test_real_package_obeys_offline_mode(tmp_path):
    """In a process of its own: huggingface_hub reads its environment when imported."""
    pytest.importorskip("huggingface_hub")
    from tests.cli.command import run

    done = run(
        "info", "--model", "owner/name",
        environment={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot fetch owner/name")
    assert done.stderr.count("\n") == 1
