"""The pictures and the command that prints them."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from jaxinfer.sharding import KINDS, build
from jaxinfer.sharding.draw_svg import svg
from jaxinfer.sharding.draw_text import describe, lane_letter, rings
from jaxinfer.sharding.show import find_topology, main
from tests.paths import REPOSITORY

DOCUMENT = REPOSITORY / "docs" / "sharding.md"
COMMAND = "python -m jaxinfer.sharding.show"


def size_for(kind: str) -> dict[str, int]:
    return {"ranks_per_node": 4} if kind == "multinode" else {}


@pytest.mark.parametrize("kind", KINDS)
def test_text_shows_every_link_in_use(kind: str):
    schedule = build(kind, 8, **size_for(kind))
    text = describe(schedule)
    assert text.startswith(f"{kind}: 8 ranks")
    assert f"{8 * schedule.num_lanes} of 56 directed links" in text
    grid = [line.split()[2:] for line in text.splitlines() if line.startswith("  from ")][:8]
    used = sum(cell != "." for row in grid for cell in row)
    assert used == 8 * schedule.num_lanes


def test_text_of_changing_links_has_a_grid_for_each_step():
    text = describe(build("xor", 8))
    assert [line for line in text.splitlines() if line.startswith("step")] == [
        f"step {step}" for step in range(7)
    ]
    assert "step 2" not in describe(build("xor", 8), steps=2)


def test_text_follows_a_piece():
    assert "piece 0: 0 > 1 > 2 > 3" in describe(build("ring", 4))
    assert "each sent by rank 0 to all" in describe(build("all_gather", 4))
    assert describe(build("ring", 1)).endswith("one rank: nothing to send")


def test_rings_of_a_permutation():
    assert rings(np.array([2, 1, 0], np.int32)) == [[0, 2], [1]]
    assert (lane_letter(0), lane_letter(61), lane_letter(62)) == ("a", "9", "#")


@pytest.mark.parametrize("kind", KINDS)
def test_svg_is_well_formed_and_has_every_arrow(kind: str):
    schedule = build(kind, 8, **size_for(kind))
    tree = ElementTree.fromstring(svg(schedule))
    paths = [p.attrib["d"] for p in tree.iter("{http://www.w3.org/2000/svg}path")]
    arrows = sum(path.count("Q") for path in paths)
    per_step = 8 * schedule.num_lanes
    assert arrows in (per_step, per_step * schedule.num_steps)
    assert "nan" not in "".join(paths)


def test_svg_of_one_rank_and_of_many():
    for n in (1, 2, 33):
        ElementTree.fromstring(svg(build("ring", n)))


def test_command_writes_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "rings.svg"
    assert main(["--ranks", "6", "--schedule", "full_link", "--out", str(out)]) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    ElementTree.parse(out)


def test_a_picture_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "folder.svg"
    out.mkdir()
    assert main(["--out", str(out)]) == 2
    assert capsys.readouterr().err == f"error: --out {out}: Is a directory\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "6"], "num_ranks=6 has no decomposition"),
        (["--schedule", "hamiltom"], "did you mean 'hamilton'?"),
        (["--ranks", "0", "--schedule", "ring"], "num_ranks must be at least 1; got 0"),
        (["--steps", "0"], "--steps must be at least 1; got 0"),
        (["--predict", "pcie4"], "did you mean 'pcie5'?"),
        (["--predict", "pcie5", "--tflops", "nan"], "flops_per_s must be a positive, finite"),
        (["--predict", "pcie5", "--ranks-per-node", "4"], "does not take ranks_per_node"),
        (["--predict", "h100-nodes", "--ranks-per-node", "3"], "ranks_per_node must divide"),
        (["--predict", "pcie5", "--ranks", "0"], "num_ranks must be at least 1; got 0"),
        (["--predict", "pcie5", "--steps", "2"], "--steps has no meaning with --predict"),
        (["--kv-heads", "2"], "--kv-heads has no meaning without --predict"),
        (["--causal"], "--causal has no meaning without --predict"),
        (["--published", "--tokens", "64"], "--tokens has no meaning with --published"),
        (["--out", "/does/not/exist.svg"], "--out /does/not/exist.svg: there is no folder /does/"),
        (["--out", "rings.png"], "--out must end in .svg; got 'rings.png'"),
        (["--out", "rings"], "--out must end in .svg; got 'rings'"),
    ],
)
def test_command_refuses_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_prediction_takes_the_causal_mask(capsys: pytest.CaptureFixture[str]):
    table = ["--predict", "pcie5", "--tokens", "65536"]
    assert main(table) == main([*table, "--causal"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 65536")]
    full, causal = (float(row.split("|")[2]) for row in rows)
    assert causal == pytest.approx(full / 2, rel=0.01)


def test_unknown_topology():
    with pytest.raises(ValueError, match="unknown topology 'zzz'; known: h100-nvswitch"):
        find_topology("zzz", 8)


def test_module_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "jaxinfer.sharding.show", "--ranks", "4", "--schedule", "xor"],
        capture_output=True, text=True, check=True, timeout=60, cwd=REPOSITORY,
    )  # fmt: skip
    assert done.stdout.startswith("xor: 4 ranks, 3 pieces per rank, 3 steps, 3 lanes")


def documented() -> list[tuple[str, str]]:
    blocks = re.findall(r"```text\n\$ (.*?)\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    return [(line, output) for line, output in blocks if line.startswith(COMMAND)]


@pytest.mark.parametrize(("line", "output"), documented(), ids=lambda value: value[:70])
def test_document_shows_what_the_command_prints(
    line: str, output: str, capsys: pytest.CaptureFixture[str]
):
    assert main(line.removeprefix(COMMAND).split()) == 0
    assert capsys.readouterr().out == output


def test_document_has_the_published_numbers(capsys: pytest.CaptureFixture[str]):
    assert main(["--published"]) == 0
    assert capsys.readouterr().out in DOCUMENT.read_text()


def test_document_has_examples():
    assert len(documented()) >= 3


def test_schedules_do_not_load_jax():
    code = "import sys, jaxinfer.sharding.show; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_names_are_found_when_they_are_used():
    code = (
        "import jaxinfer.sharding as s; print(all(callable(getattr(s, n)) for n in s.__all__ "
        "if n not in ('KINDS', 'TOPOLOGIES'))); s.ringattention"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True"
    assert "has no attribute 'ringattention'" in done.stderr


def test_a_reader_that_leaves_is_no_error():
    line = f"{sys.executable} -m jaxinfer.sharding.show --ranks 64 | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("1\n", "")
