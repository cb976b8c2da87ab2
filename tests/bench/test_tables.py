"""Tables of README and docs, made from saved rows."""

import pytest

from bench.grid import grids, number, percent
from bench.tables import regenerate, update_all
from tests.bench.fakes import row, write

NORM = ["llama-3-8b m1 d4096", "llama-3-8b m64 d4096", "gemma-3-270m m8 d640 plain"]


@pytest.fixture
def results(tmp_path):
    """Rows of three cases, in another order than the registry's; one of ours loses."""
    rows = [
        row(NORM[2], "xla", 1.5),
        row(NORM[2], "dispatch", 2.0, ran="mosaic"),
        row(NORM[1], "xla", 4.0),
        row(NORM[1], "mosaic", 2.04),
        row(NORM[1], "dispatch", 2.05, ran="mosaic"),
        row(NORM[0], "dispatch", 1234.5, ran="xla"),
        row("ci m1 d128", "dispatch", 9.0),
    ]
    return write(tmp_path / "results", rows)


def block(marker, results):
    """The lines between the markers, without empty ones."""
    text = f"before\n<!-- bench:{marker} -->\nold\n<!-- /bench -->\nafter\n"
    lines = regenerate(text, where="a.md", results=results).splitlines()
    assert lines[:2] == ["before", f"<!-- bench:{marker} -->"]
    assert lines[-2:] == ["<!-- /bench -->", "after"]
    assert "old" not in lines
    return [line for line in lines[2:-2] if line]


def test_a_block(results):
    assert block("add_rms_norm", results) == [
        "NVIDIA H100 80GB HBM3, driver 580.1, JAX 0.11.2, commit abc1234, 2026-01-02. "
        "Median µs of a call, in parentheses what `dispatch` took; bold: the fastest, "
        "where ours had a rival; –: not supported or not measured.",
        "| case | `dispatch` | `mosaic` | `xla` | floor, µs | floor reached by ours |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| llama-3-8b m1 d4096 | 1,234 (xla) | – | – | 1.00 | 0.1% |",
        "| llama-3-8b m64 d4096 | 2.05 (mosaic) | **2.04** | 4.00 | 1.00 | 49% |",
        "| gemma-3-270m m8 d640 plain | 2.00 (mosaic) | – | **1.50** | 1.00 | 50% |",
        "Made by `python -m bench run --op add_rms_norm --save`.",
    ]


def test_options_restrict_cases_and_columns(results):
    lines = block('add_rms_norm words="llama-3-8b m64" impl="xla, dispatch"', results)
    assert lines[1:4] == [
        "| case | `xla` | `dispatch` | floor, µs | floor reached by ours |",
        "| --- | ---: | ---: | ---: | ---: |",
        # The column left out is the kernel that `dispatch` took: the same thing, not a rival.
        "| llama-3-8b m64 d4096 | 4.00 | **2.05** (mosaic) | 1.00 | 49% |",
    ]
    assert "those left out here compete too" in lines[0]


def test_a_table_of_one_device_alone(results):
    folder = next(path.name for path in results.iterdir())
    assert block(f'add_rms_norm device="{folder}"', results) == block("add_rms_norm", results)
    (results / "another").mkdir()
    assert block('add_rms_norm device="another"', results)[0].startswith("Not measured yet")


def test_a_faster_column_left_out_takes_the_bold(results):
    lines = block('add_rms_norm words="plain" impl="dispatch"', results)
    assert lines[3] == "| gemma-3-270m m8 d640 plain | 2.00 (mosaic) | 1.00 | 50% |"


def test_only_the_kernel_shown_of_the_two_that_are_one(results):
    lines = block('add_rms_norm words="m64" impl="mosaic"', results)
    assert lines[3] == "| llama-3-8b m64 d4096 | **2.04** | 1.00 | 49% |"


def test_rows_of_several_commits_name_them_all(results):
    write(results, [row(NORM[0], "xla", 1.0, commit="def5678", date="2026-02-03", jax="0.12.0")])
    assert (
        "JAX 0.11.2 and 0.12.0, commits abc1234 (2026-01-02), def5678 (2026-02-03)."
        in block("add_rms_norm", results)[0]
    )


def test_a_table_per_device(results):
    other = {"device": "NVIDIA H200", "driver": "590"}
    write(results, [row(NORM[0], "dispatch", 1.0, **other)], key="nvidia_h200")
    lines = block("add_rms_norm", results)
    heads = [line.split(",")[0] for line in lines if line.startswith("NVIDIA")]
    assert heads == ["NVIDIA H100 80GB HBM3", "NVIDIA H200"]
    assert sum(line.startswith("Made by") for line in lines) == 1


def test_an_unknown_floor_and_driver_are_left_out(tmp_path):
    rows = [row(NORM[0], "xla", 3.0, floor_us=0.0, device="cpu", driver="")]
    lines = block("add_rms_norm", write(tmp_path, rows, key="cpu"))
    assert lines[0].startswith("cpu, JAX 0.11.2, commit")
    assert lines[-2] == "| llama-3-8b m1 d4096 | **3.00** | – | – |"


def test_a_case_that_the_registry_lost_stays_at_the_end(results):
    write(results, [row("old-model m1", "dispatch", 1.0), row(NORM[0], "old-peer", 1.0)])
    grid = grids("add_rms_norm", results=results)[0]
    assert grid.cases == (*NORM, "old-model m1")
    assert grid.implementations == ("dispatch", "mosaic", "xla", "old-peer")


@pytest.mark.parametrize(
    ("op", "case", "unit"),
    [
        ("e2e_decode", "llama-3-8b b8 s1024", "ms per token of a request"),
        ("e2e_prefill", "llama-3-8b b1 t1024", "ms to the first token"),
    ],
)
def test_whole_models_are_in_ms_and_tokens_per_second(tmp_path, op, case, unit):
    rows = [
        row(case, "dispatch", 6105.0, op=op, floor_us=5048.0, tokens_per_s=1310.0),
        row(case, "plain_cudnn", 6064.0, op=op, floor_us=5048.0, tokens_per_s=1319.0),
    ]
    lines = block(op, write(tmp_path, rows, op=op))
    assert unit in lines[0]
    assert "tokens/s" in lines[0]
    assert lines[1].endswith("| floor, ms | floor reached by ours |")
    assert lines[3] == f"| {case} | 6.11 (1,310) | **6.06** (1,319) | 5.05 | 83% |"


def test_no_results(tmp_path):
    command = "`python -m bench run --op attention --save`"
    assert block("attention", tmp_path) == [f"Not measured yet; {command} does it."]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x\n<!-- bench:atention -->\n<!-- /bench -->\n", "a.md, line 2: unknown op 'atention'"),
        ("<!-- bench:attention -->\n", "line 1: the marker is not closed"),
        ("<!-- /bench -->\n", "line 1: closes a marker that was not opened"),
        (
            "<!-- bench:attention -->\n<!-- bench:attention -->\n<!-- /bench -->\n",
            "line 2: the marker of line 1 is not closed",
        ),
        ("<!-- bench:attention words=x -->\n<!-- /bench -->\n", "expected <!-- bench:OP"),
        ('<!-- bench:attention word="x" -->\n<!-- /bench -->\n', "known: words, impl"),
        ('<!-- bench:attention words="nobody" -->\n<!-- /bench -->\n', "no case of attention"),
        ('<!-- bench:attention impl="cudn" -->\n<!-- /bench -->\n', "implementation 'cudn'"),
        ('<!-- bench:attention device="h20" -->\n<!-- /bench -->\n', "unknown device 'h20'"),
    ],
)
def test_a_marker_that_is_wrong_is_an_error(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        regenerate(text, where="a.md", results=tmp_path)


@pytest.fixture
def pages(tmp_path):
    """A README and two documents, one with a block."""
    root = tmp_path / "root"
    (root / "docs" / "kernels").mkdir(parents=True)
    (root / "README.md").write_text("<!-- bench:add_rms_norm -->\n<!-- /bench -->")
    (root / "docs" / "plain.md").write_text("Nothing.\n")
    (root / "docs" / "kernels" / "a.md").write_text(
        "# A\n\n<!-- bench:add_rms_norm -->\n<!-- /bench -->\n"
    )
    return root


def test_update_writes_what_differs_and_then_nothing(pages, results):
    want = [pages / "README.md", pages / "docs" / "kernels" / "a.md"]
    assert update_all(write=False, root=pages, results=results) == want
    assert "mosaic" not in want[1].read_text(), "only looked"
    assert update_all(write=True, root=pages, results=results) == want
    assert "(mosaic)" in want[0].read_text()
    assert want[1].read_text().startswith("# A\n\n<!-- bench:add_rms_norm -->\n\nNVIDIA")
    assert update_all(write=True, root=pages, results=results) == []
    write(results, [row(NORM[0], "xla", 0.5)])
    assert update_all(write=False, root=pages, results=results) == want


def test_nothing_is_written_if_one_marker_is_wrong(pages, results):
    (pages / "docs" / "z.md").write_text("<!-- bench:add_rms_norm -->\n")
    before = (pages / "README.md").read_text()
    with pytest.raises(ValueError, match=r"docs/z\.md, line 1"):
        update_all(write=True, root=pages, results=results)
    assert (pages / "README.md").read_text() == before


def test_the_tables_here_are_those_of_the_results_here():
    assert update_all(write=False) == [], "run python -m bench tables"


def test_numbers_have_three_digits():
    values = (14140.0, 321.4, 53.86, 2.08, 0.6608, 0.01286, 0.0)
    assert [number(value) for value in values] == [
        "14,140", "321", "53.9", "2.08", "0.661", "0.0129", "0.0000",
    ]  # fmt: skip
    shares = (1.043, 0.0996, 0.0994, 0.006)
    assert [percent(share) for share in shares] == ["104%", "10%", "9.9%", "0.6%"]
