"""From rows to the chooser's table."""

import json

from bench import rows, tune
from jaxinfer.pallas_kernels.device import H100, use_device

QKV, DOWN = "llama-3-8b qkv m8 k4096 n6144", "llama-3-8b down m8 k14336 n4096"


def row(case, implementation, us):
    return {"case": case, "implementation": implementation, "median_us": us}


def test_the_fastest_tiling_or_xla(tmp_path, monkeypatch):
    measured = [
        row(QKV, "xla", 20.0), row(QKV, "mosaic-n128-k64-c1", 18.0),
        row(QKV, "mosaic-n64-k128-c1", 19.0), row(QKV, "dispatch", 1.0),
        row(DOWN, "xla", 40.0), row(DOWN, "mosaic-n128-k64-c1", 39.9),
        row("llama-3-8b o m8 k4096 n4096", "xla", 14.0),  # nothing to compare with
    ]  # fmt: skip
    monkeypatch.setattr(rows, "load", lambda _: measured)
    with use_device(H100):
        path = tune.write(tmp_path)
    entries = json.loads(path.read_text())["entries"]
    assert path == tmp_path / H100.key / "matmul.json"
    assert {key: entry["implementation"] for key, entry in entries.items()} == {
        "m8 k4096 n6144": "mosaic", "m8 k14336 n4096": "xla",
    }  # fmt: skip
    assert entries["m8 k4096 n6144"]["us"] == {"xla": 20.0, "mosaic": 18.0}
    assert entries["m8 k4096 n6144"]["config"]["block_n"] == 128


def test_of_models_that_share_a_product_the_one_with_most_tilings_counts():
    first, second = (f"{model} o m8 k4096 n4096" for model in ("llama-3-8b", "llama-2-7b"))
    measured = [
        row(second, "xla", 11.0), row(second, "mosaic-n64-k64-c1", 10.0),
        row(first, "xla", 12.0), row(first, "mosaic-n64-k64-c1", 10.5),
        row(first, "mosaic-n64-k128-c1", 9.0), row(second, "mosaic", 1.0),
    ]  # fmt: skip
    with use_device(H100):
        for rows_in_order in (measured, measured[::-1]):
            (entry,) = tune.tune_matmul(rows_in_order).values()
            assert entry["us"] == {"xla": 12.0, "mosaic": 9.0}
