"""`--mesh` changes no answer."""

import pytest

from jaxinfer.cli.main import main
from tests.cli.command import write_tiny_model


@pytest.fixture
def said(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # the user's cache is left alone
    path = write_tiny_model(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("What is read is scored, word by word. " * 3)

    def run(command: str, *arguments: str) -> str:
        given = {
            "generate": ["generate", "One", "Two", "Three", "--model", str(path), "--raw",
                         "--max-tokens", "6", "--ignore-eos"],
            "eval": ["eval", "perplexity", str(path), "--text", str(text)],
        }[command]  # fmt: skip
        assert main([*given, *arguments, "--progress", "off"]) == 0
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("mesh", ["tensor=2", "data=2,seq=2,tensor=2"])
def test_generate(said, mesh):
    want = said("generate")
    assert want.count("## ") == 3
    assert said("generate", "--mesh", mesh) == want


def test_eval(said):
    want, got = said("eval"), said("eval", "--mesh", "tensor=3")
    assert got.splitlines()[:3] == want.splitlines()[:3]


def test_eval_of_copies(said, capsys):
    with pytest.raises(AssertionError):
        said("eval", "--mesh", "data=2")
    assert "one copy of the model is used here; leave out data=2" in capsys.readouterr().err
