"""The picture of the cost model."""

import importlib.util
import sys

import pytest

from bench import modelled
from jaxinfer.sharding.topology import h100_nvswitch, mi300x_mesh
from tests.bench.test_plot import needs_matplotlib, words
from tests.paths import REPOSITORY


@pytest.mark.parametrize("system", modelled.SYSTEMS, ids=lambda system: system[0])
@pytest.mark.parametrize("shape", modelled.SHAPES, ids=lambda shape: shape.label)
def test_no_choice_is_predicted_slower_than_the_ring(system, shape):
    _, topology, flops_per_s = system
    gains = modelled.gains(topology(8), flops_per_s, shape)
    assert min(gains) >= 1.0
    assert gains[-1] == 1.0, "computation hides what long prompts send"


def test_a_mesh_gains_more_than_a_switch():
    for shape in modelled.SHAPES:
        switch = modelled.gains(h100_nvswitch(8), 600e12, shape)
        mesh = modelled.gains(mi300x_mesh(8), 300e12, shape)
        assert max(switch) < max(mesh)


@needs_matplotlib
def test_the_picture_says_that_it_is_modelled_and_is_the_committed_one(tmp_path, capsys):
    path = tmp_path / "picture.svg"
    assert modelled.main(["--out", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    shown = words(path)
    assert any(text.startswith("MODELLED, not measured") for text in shown)
    for name, _, _ in modelled.SYSTEMS:
        assert name in shown
        assert name.startswith("modelled: ")
    assert "published mean 1.57" in shown
    committed = REPOSITORY / modelled.OUT
    assert words(committed) == shown
    assert str(modelled.OUT).removeprefix("docs/") in (REPOSITORY / "docs/sharding.md").read_text()


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "matplotlib", raising=False)
    assert modelled.main(["--out", str(tmp_path / "picture.svg")]) == 2
    assert "pip install 'jaxinfer[bench]'" in capsys.readouterr().err
