"""`jaxinfer tune`, with a clock that reads what the test has written down."""

import json

import pytest

from jaxinfer.autotune import tune as module
from jaxinfer.autotune.measure import WrongResult
from jaxinfer.cli.main import main
from jaxinfer.pallas_kernels.device import CPU, H100, use_device
from tests.autotune.fakes import Clock


@pytest.fixture
def clock(tmp_path, monkeypatch):
    """Tune on an H100 that measures by a `Clock`; data are kept below `tmp_path`."""
    monkeypatch.delenv("JAXINFER_TUNING")
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path))

    def install(*args, **kwargs):
        made = Clock(*args, **kwargs)
        monkeypatch.setattr(module, "measure", made)
        return made

    with use_device(H100):
        yield install


def data(folder, op="matmul"):
    file = folder / H100.key / f"{op}.json"
    return file, json.loads(file.read_text())


def test_what_is_written_and_shown(clock, capsys, tmp_path):
    clock({1: 0.8, 8: 2, 16: 2, 32: 2, 64: 2, 128: 2, (8, 1024): 2})
    assert main(["tune", "llama-3-8b"]) == 0
    out, err = capsys.readouterr()
    file, content = data(tmp_path / "tuning")
    assert content["command"] == "jaxinfer tune llama-3-8b"
    assert content["entries"]["m1 k4096 n28672 gated"]["us"] == {"xla": 100.0, "mosaic": 80.0}
    assert len(content["entries"]) == 30
    assert "qkv      flat kernel for M = 1, else XLA (M1 = 1, M2 = 2)" in out
    # The heuristic takes XLA for 1 token.
    assert "80.0   100.0       80.0    25.0 %        0.0 %          25.0 %" in out
    assert f"written to {file}" in out
    other, content = data(tmp_path / "tuning", "decode_attention")
    assert content["command"] == "jaxinfer tune llama-3-8b"
    assert content["entries"]["b8 s1024 n32 k8 h128 p64"]["implementation"] == "xla"
    assert len(content["entries"]) == 11
    assert "XLA for b8 s1024 n32 k8 h128 p64; else the kernel" in out
    assert out.index("# decode_attention") < out.index(f"written to {other}")
    assert "JAXINFER_TUNING" not in out
    skipped = "decode_attention llama-3-8b b64 s131072: not measured, 32 GiB of keys and values\n"
    assert err.startswith(skipped)
    assert "30 products of matmul on NVIDIA H100 80GB HBM3, about " in err
    assert "tune matmul: 30 products in" in err
    assert "11 calls of decode_attention on NVIDIA H100 80GB HBM3, about " in err
    assert "tune decode_attention: 11 calls in" in err
    assert "\x1b" not in err


@pytest.mark.parametrize("op", ["matmul", "decode_attention"])
def test_one_op(clock, capsys, tmp_path, op):
    clock()
    assert main(["tune", "llama-3-8b", "--op", op]) == 0
    (file,) = (tmp_path / "tuning" / H100.key).iterdir()
    assert file.stem == op
    assert data(tmp_path / "tuning", op)[1]["command"] == f"jaxinfer tune llama-3-8b --op {op}"
    out, err = capsys.readouterr()
    other = {"matmul", "decode_attention"} - {op}
    assert not any(name in out + err for name in other)


def test_an_op_that_is_not_measured(capsys):
    assert main(["tune", "llama-3-8b", "--op", "attention"]) == 2
    assert "decode_attention" in capsys.readouterr().err


def test_help_has_an_example_of_one_op(capsys):
    assert main(["tune", "--help"]) == 0
    assert "jaxinfer tune llama-3-8b --op decode_attention" in capsys.readouterr().out


def test_entries_of_other_models_stay(clock, tmp_path):
    clock()
    assert main(["tune", "llama-3-8b", "--progress", "off"]) == 0
    assert main(["tune", "llama-2-7b", "--progress", "off"]) == 0
    entries = data(tmp_path / "tuning")[1]["entries"]
    assert {"m8 k4096 n6144", "m8 k4096 n12288"} <= set(entries)
    entries = data(tmp_path / "tuning", "decode_attention")[1]["entries"]
    assert {"b1 s1024 n32 k8 h128 p64", "b1 s1024 n32 k32 h128 p64"} <= set(entries)


def test_json_and_another_folder(clock, capsys, tmp_path):
    clock()
    out = tmp_path / "mine" / "data"
    assert main(["tune", "llama-3-8b", "--out", str(out), "--json", "--progress", "off"]) == 0
    printed, err = capsys.readouterr()
    ops = json.loads(printed)["ops"]
    assert ops["matmul"]["file"] == str(data(out)[0])
    assert len(ops["matmul"]["products"]) == 30
    assert ops["matmul"]["products"][0]["part"] == "qkv"
    assert ops["matmul"]["kernel_for"]["down"] == [[1, 128]]
    assert ops["decode_attention"]["file"] == str(data(out, "decode_attention")[0])
    first, *_ = calls = ops["decode_attention"]["calls"]
    assert len(calls) == 11
    assert first | {"config": None} == {
        "B": 1, "S": 1024, "N": 32, "K": 8, "H": 128, "page_size": 64, "local_window_size": None,
        "implementation": "mosaic", "config": None, "us": {"xla": 100.0, "mosaic": 90.0},
        "heuristic_us": 90.0,
    }  # fmt: skip
    assert err == ""
    assert not (tmp_path / "tuning").exists()


def test_another_folder_is_not_read_by_itself(clock, capsys, tmp_path):
    clock()
    assert main(["tune", "llama-3-8b", "--out", str(tmp_path)]) == 0
    assert f"read where JAXINFER_TUNING={tmp_path}" in capsys.readouterr().out


def test_ctrl_c_keeps_what_was_measured(clock, capsys, tmp_path):
    clock(fail_at=3)
    assert main(["tune", "llama-3-8b"]) == 130
    err = capsys.readouterr().err
    file, content = data(tmp_path / "tuning")
    assert len(content["entries"]) == 3
    assert f"3 of 30 products of matmul are kept in {file}\nerror: interrupted\n" in err


def test_ctrl_c_in_the_second_op_leaves_the_first_ones_report(clock, capsys, tmp_path):
    clock(fail_at=32)
    assert main(["tune", "llama-3-8b"]) == 130
    out, err = capsys.readouterr()
    assert len(data(tmp_path / "tuning")[1]["entries"]) == 30
    file, content = data(tmp_path / "tuning", "decode_attention")
    assert len(content["entries"]) == 2
    assert f"written to {data(tmp_path / 'tuning')[0]}" in out
    assert f"2 of 11 calls of decode_attention are kept in {file}\nerror: interrupted\n" in err


def test_ctrl_c_before_anything_was_measured(clock, capsys, tmp_path):
    clock(fail_at=0)
    assert main(["tune", "llama-3-8b"]) == 130
    assert "0 of 30 products of matmul were measured; nothing is written" in capsys.readouterr().err
    assert list((tmp_path / "tuning").iterdir()) == []


def test_a_wrong_result_is_one_line(clock, capsys):
    clock(fail_at=1, error=WrongResult("the kernel computes qkv wrongly"))
    assert main(["tune", "llama-3-8b"]) == 1
    err = capsys.readouterr().err
    assert err.endswith("error: the kernel computes qkv wrongly\n")
    assert "1 of 30 products of matmul are kept" in err


def test_what_the_kernel_cannot_compute_is_named(clock, capsys, tmp_path):
    """Llama's tiny sibling has 64 + 2 · 32 = 128 columns of Q, K and V, and a depth of 96."""
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 256,
        "hidden_size": 96, "head_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 128, "max_position_embeddings": 512,
    }))  # fmt: skip
    clock()
    assert main(["tune", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "qkv m1 k96 n128: XLA, the kernel cannot serve it" in err
    assert "b1 s1024: XLA, the kernel cannot serve it" in err
    assert f"the kernels can serve no call of {tmp_path}" in err.splitlines()[-1]
    assert main(["tune", str(tmp_path), "--op", "matmul"]) == 2
    err = capsys.readouterr().err
    assert f"the kernels can serve no call of matmul of {tmp_path}" in err.splitlines()[-1]


def test_without_a_hopper_gpu(capsys):
    with use_device(CPU):
        assert main(["tune", "no-such-model"]) == 2
    err = capsys.readouterr().err
    assert err == (
        "error: tune needs a Hopper GPU (compute capability 9.0), for which the kernel is made; "
        "this machine's device is 'cpu', where XLA is always taken\n"
    )


def test_a_model_that_does_not_exist(clock, capsys):
    clock()
    assert main(["tune", "no-such-model"]) == 2
    assert "'no-such-model' does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["taken", "taken/below"])
def test_a_folder_that_cannot_be_made(clock, capsys, tmp_path, out):
    made = clock()
    (tmp_path / "taken").write_text("")
    assert main(["tune", "llama-3-8b", "--out", str(tmp_path / out)]) == 2
    assert f"cannot make the folder {tmp_path / out}: " in capsys.readouterr().err
    assert made.asked == []


def test_without_a_place_for_data(clock, capsys, monkeypatch):
    clock()
    monkeypatch.setenv("JAXINFER_TUNING", "")
    assert main(["tune", "llama-3-8b"]) == 2
    assert "name a folder by --out" in capsys.readouterr().err


def test_info_says_which_files_decide(clock, capsys, tmp_path):
    clock()
    assert main(["tune", "llama-3-8b", "--progress", "off"]) == 0
    capsys.readouterr()
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    mine = out.index(f"measured choices of matmul: 30 from {data(tmp_path / 'tuning')[0]}")
    assert out.index("pallas_kernels/data", mine) > mine
    file = data(tmp_path / "tuning", "decode_attention")[0]
    assert f"measured choices of decode_attention: 11 from {file}" in out


def test_info_shows_what_was_chosen(clock, capsys):
    """8 requests with room for 4096 tokens."""
    clock({(8, 8192): 2})
    assert main(["tune", "llama-3-8b", "--progress", "off"]) == 0
    capsys.readouterr()
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "  decode_attention, decode: xla\n" in out
