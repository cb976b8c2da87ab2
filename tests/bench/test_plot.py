"""Pictures of saved rows."""

import importlib.util
import xml.etree.ElementTree

import pytest

from bench.plot import plot_all
from tests.bench.fakes import KEY, row, write

DECODE = "llama-3-8b b8 s1024"
NORM = ["llama-3-8b m1 d4096", "gemma-3-270m m8 d640 plain"]

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)


@pytest.fixture
def results(tmp_path):
    """Rows of an op and of a whole model."""
    ours = [row(case, "dispatch", 1.25, ran="mosaic") for case in NORM]
    peers = [row(case, "xla", 2.5) for case in NORM]
    write(tmp_path / "results", [*ours, row(NORM[0], "mosaic", 1.3), *peers])
    model = row(DECODE, "xla", 6105.0, op="e2e_decode", floor_us=5048.0, tokens_per_s=1310.0)
    return write(tmp_path / "results", [model], op="e2e_decode")


def words(path):
    """All texts of a picture."""
    root = xml.etree.ElementTree.parse(path).getroot()
    return [text for text in ("".join(x.itertext()).strip() for x in root.iter()) if text]


@needs_matplotlib
def test_a_picture_per_op(results, tmp_path):
    paths = plot_all("", tmp_path / "out", results=results)
    assert paths == [tmp_path / "out" / KEY / f"{op}.svg" for op in ("add_rms_norm", "e2e_decode")]
    shown = words(paths[0])
    assert "add_rms_norm on NVIDIA H100 80GB HBM3, 2026-01-02" in shown
    assert {*NORM, "dispatch (mosaic)", "xla", "1.25 µs", "2.50 µs", "floor 1.00 µs"} <= set(shown)
    assert "mosaic" not in shown, "what dispatch took has no bar of its own"
    shown = words(paths[1])
    assert {DECODE, "xla", "6.11 ms, 1,310 tokens/s", "floor 5.05 ms"} <= set(shown)


@needs_matplotlib
def test_the_same_rows_give_the_same_file(results, tmp_path):
    first, second = (
        plot_all("add_rms_norm", tmp_path / out, results=results)[0].read_bytes() for out in "ab"
    )
    assert first == second
    assert b"<dc:date>" not in first
    assert b'width="600pt"' in first, "800 pixels"
    assert len(first) < 50_000


@needs_matplotlib
def test_without_a_floor_bars_are_times(tmp_path):
    rows = [row(case, "xla", 3.0, floor_us=0.0, device="cpu") for case in NORM]
    (path,) = plot_all("add_rms_norm", tmp_path, results=write(tmp_path, rows, key="cpu"))
    shown = words(path)
    assert "Bars: median time of a call, shorter is better" in shown
    assert not any(text.startswith("floor") for text in shown)


@needs_matplotlib
def test_a_share_above_one_stays_in_the_picture(tmp_path):
    results = write(tmp_path, [row(NORM[0], "dispatch", 0.9)])
    (path,) = plot_all("add_rms_norm", tmp_path, results=results)
    assert "0.900 µs" in words(path)


def test_no_results_is_an_error_only_for_a_named_op(tmp_path):
    with pytest.raises(ValueError, match="no results of attention"):
        plot_all("attention", tmp_path, results=tmp_path)


def test_an_unknown_op_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'attention'"):
        plot_all("atention", tmp_path, results=tmp_path)


def test_without_matplotlib_the_error_says_what_to_install(results, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'jaxinfer\[bench\]'"):
        plot_all("add_rms_norm", tmp_path / "out", results=results)
    assert not (tmp_path / "out").exists()
