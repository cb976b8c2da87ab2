"""Where things of the user's are kept."""

from pathlib import Path

import pytest

from jaxinfer import folders


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path))
    assert folders.cache_dir() == tmp_path
    monkeypatch.delenv("JAXINFER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert folders.cache_dir() == tmp_path / "jaxinfer"
    monkeypatch.setenv("HOME", str(tmp_path))
    for unusable in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert folders.cache_dir() == tmp_path / ".cache" / "jaxinfer"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert folders.cache_dir() == tmp_path / ".cache" / "jaxinfer"


def test_tuning_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path))
    monkeypatch.delenv("JAXINFER_TUNING", raising=False)
    assert folders.tuning_dir() == tmp_path / "tuning"
    monkeypatch.setenv("JAXINFER_TUNING", str(tmp_path / "mine"))
    assert folders.tuning_dir() == tmp_path / "mine"
    monkeypatch.setenv("JAXINFER_TUNING", "")
    assert folders.tuning_dir() is None


@pytest.mark.parametrize("folder", [None, "~/tuning"])
def test_a_user_without_a_home_has_no_tuning_data(monkeypatch, folder):
    def homeless(*_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(Path, "expanduser", homeless)
    for name in ("JAXINFER_CACHE", "XDG_CACHE_HOME", "JAXINFER_TUNING"):
        monkeypatch.delenv(name, raising=False)
    if folder:
        monkeypatch.setenv("JAXINFER_TUNING", folder)
    assert folders.tuning_dir() is None
