"""The command as a whole: help, start-up, exit codes, output that is not a terminal."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from jaxinfer.cli import generate
from jaxinfer.cli.commands import COMMANDS
from jaxinfer.cli.main import main
from jaxinfer.models.checkpoint.open import open_checkpoint
from jaxinfer.models.tokenizer.tokenizer import Tokenizer
from tests.cli.command import REPOSITORY, command, run


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_has_examples_and_every_option(name, capsys):
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"usage: jaxinfer {name}" in out
    assert "Examples:\n  jaxinfer" in out
    assert "--debug" in out
    assert "{None}" not in out


def test_a_warning_comes_before_the_answer(tiny):
    options = ("--softmax", "unified", "--implementation", "xla", "--max-tokens", "6")
    done = subprocess.run(
        command("generate", "Hi", "--model", tiny, *options),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=REPOSITORY, check=True,
    )  # fmt: skip
    load, warning, *answer, speed = done.stdout.splitlines()
    assert load.startswith(b"load: ")
    assert b"the unified softmax is not run: xla serves" in warning
    assert answer
    assert b"the unified softmax" not in b"".join(answer)
    assert speed.startswith(b"6 tokens, ")


def test_one_prompt_and_one_token(tiny, capsys):
    assert main(["generate", "Hi", "--json", "--model", tiny, "--max-tokens", "1"]) == 0
    assert "\n1 prompt, 1 token in " in capsys.readouterr().err


@pytest.mark.parametrize("command", [("eval", "perplexity"), ("calibrate", "softmax")])
def test_usage_of_commands_of_two_words(command, capsys):
    assert main([*command, "--help"]) == 0
    whole = capsys.readouterr().out
    options = f"[{command[1].upper()} OPTIONS]"
    assert whole.startswith(
        f"usage: jaxinfer {' '.join(command)} [-h] {options} MODEL --text FILE\n"
    )
    assert main([command[0], "--help"]) == 0
    assert capsys.readouterr().out == whole
    for rest, came in (([], ""), (["MODEL"], "; got 'MODEL'")):
        assert main([command[0], *rest]) == 2
        said = f"error: {command[0]} needs {command[1]} as its next word{came} (see jaxinfer"
        assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_is_filled(name, capsys, monkeypatch):
    """A line ends where the next word would not fit, or an option's text ends."""
    monkeypatch.setenv("COLUMNS", "80")
    assert main([name, "--help"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    for line, following in itertools.pairwise(lines):
        text, word = line.strip("│").rstrip(), following.strip("│ ").split(" ")[0]
        continues = following.startswith("│       ") and line.startswith("│       ")
        if continues and not re.search(r"[,=]", word):
            assert len(text) + 1 + len(word) >= 77, text


def test_help_of_convert_promises_no_speed(capsys):
    """A dequantised model is larger than the GGUF file that it came from."""
    assert main(["convert", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "stored dequantised, in one dtype, and a device reads only its part" in text
    assert "faster" not in text


def test_help_lists_commands(capsys):
    assert main(["--help"]) == 0
    whole = capsys.readouterr().out
    assert all(f"{name} " in whole for name in COMMANDS)
    assert "--version" in whole
    assert main([]) == 0
    assert capsys.readouterr().out == whole


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("jaxinfer 0.")


def test_help_imports_nothing_heavy():
    """So that it is quick: jax alone takes longer than everything else here."""
    code = (
        "import sys; from jaxinfer.cli.main import main; main(['generate', '--help']); "
        "print([m for m in ('flax', 'orbax', 'tokenizers', 'gguf', 'rich', 'jinja2') "
        "if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True
    )
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize(
    ("typed", "prompt"),
    [
        (b"\xef\xbb\xbfhi\r\n", "hi"),  # as editors on Windows write it
        (b"hi\n", "hi"),
        (b"hi\n\r\n", "hi\n"),
        (b"a\r\nb\n\n", "a\r\nb\n"),
        (b"hi\r", "hi\r"),
    ],
)
def test_a_prompt_on_standard_input_ends_before_its_line_end(typed, prompt, monkeypatch):
    monkeypatch.setattr("jaxinfer.cli.streams.read_stdin", lambda: typed)
    assert generate._read_stdin() == prompt


def test_generate_streams_plain_text(tiny):
    """Not a terminal: the answer alone on standard output, lines on standard error."""
    done = run("generate", "Hello", "--model", tiny, "--max-tokens", "8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")
    assert "\x1b" not in done.stdout + done.stderr
    assert "load: " in done.stderr
    last = done.stderr.splitlines()[-1]
    assert "8 tokens" in last
    assert "tokens/s" in last
    assert "first token after" in last


def test_streamed_equals_complete_equals_json(tiny, capfd):
    options = ["--model", tiny, "--max-tokens", "12", "--progress", "off"]
    texts = []
    for extra in ([], ["--no-stream"]):
        assert main(["generate", "Hello", *options, *extra]) == 0
        texts.append(capfd.readouterr().out.removesuffix("\n"))
    assert main(["generate", "Hello", "Hello", *options, "--json"]) == 0
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == [texts[0], texts[0]]
    assert texts[0] == texts[1]
    assert rows[0]["finish_reason"] == "length"
    assert len(rows[0]["token_ids"]) == 12
    assert rows[0]["prompt_tokens"] == len("user: Hello\nassistant: ")


def test_raw_prompt_from_standard_input(tiny):
    done = run(
        "generate", "-", "--raw", "--json", "--model", tiny, "--max-tokens", "2", stdin="abc\n"
    )
    row = json.loads(done.stdout)
    assert row["prompt"] == "abc"
    assert row["prompt_tokens"] == 3


def test_system_message_and_several_prompts(tiny, capfd):
    options = ["--model", tiny, "--max-tokens", "2", "--progress", "off"]
    assert main(["generate", "A", "--system", "S", "--json", *options]) == 0
    row = json.loads(capfd.readouterr().out)
    assert row["prompt_tokens"] == len("system: S\nuser: A\nassistant: ")
    assert main(["generate", "A", "B", *options]) == 0
    out = capfd.readouterr().out
    assert "## A\n" in out
    assert "## B\n" in out


def test_seed_decides_the_answer(tiny, capfd):
    def answer(seed: int) -> list[int]:
        options = ["--temperature", "1", "--seed", str(seed), "--max-tokens", "20", "--json"]
        assert main(["generate", "A", "--model", tiny, "--progress", "off", *options]) == 0
        return json.loads(capfd.readouterr().out)["token_ids"]

    assert answer(1) == answer(1) != answer(2)


def test_stop_text_ends_the_answer(tiny, capfd):
    def text(*options: str) -> str:
        command = ["generate", "A", "--model", tiny, "--max-tokens", "30", "--json"]
        assert main([*command, "--progress", "off", *options]) == 0
        return json.loads(capfd.readouterr().out)["text"]

    whole = text()
    stop = next(char for char in whole[3:] if char.isascii() and char not in whole[:3])
    assert text("--stop", stop) == whole[: whole.index(stop)]


def test_eval_on_a_file(tiny, capfd, tmp_path):
    (tmp_path / "text.txt").write_text("All work and no play makes Jack a dull boy. " * 20)
    options = ["eval", "perplexity", tiny, "--text", str(tmp_path / "text.txt"), "--window", "128"]
    assert main([*options, "--json"]) == 0
    row = json.loads(capfd.readouterr().out)
    assert row["tokens"] == 20 * 44 - 1
    assert row["stride"] == 64
    assert main([*options, "--progress", "plain"]) == 0
    out, err = capfd.readouterr()
    assert f"perplexity     {row['perplexity']:.4f}" in out
    assert f"bits per byte  {row['bits_per_byte']:.4f}" in out
    assert "evaluate: 879 tokens" in err


def test_convert_reads_back(tiny, tmp_path, capfd):
    out = tmp_path / "copies" / "model"
    assert main(["convert", tiny, str(out), "--dtype", "float32"]) == 0
    assert "float32" in capfd.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    for model in (tiny, str(out)):
        options = ["--model", model, "--max-tokens", "8", "--progress", "off"]
        assert main(["generate", "Hello", *options]) == 0
    first, second = capfd.readouterr().out.splitlines()
    assert first == second


def interrupt(process: subprocess.Popen[str], when: str) -> tuple[str, str]:
    """Send Ctrl-C when a text has appeared on standard output; what was written."""
    assert process.stdout is not None
    seen = ""
    while when not in seen or len(seen) < 3:
        char = process.stdout.read(1)
        assert char, process.communicate()
        seen += char
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return seen + out, err


def test_interrupt_ends_generate_with_130(long_context):
    process = subprocess.Popen(
        command("generate", "Hello", "--model", long_context, "--max-tokens", "19000"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        cwd=REPOSITORY,
    )  # fmt: skip
    out, err = interrupt(process, "")
    assert process.returncode == 130
    assert out.endswith("\n")
    assert err.splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in err


def test_interrupt_while_converting_leaves_nothing(tiny, tmp_path):
    """Soon after the start, and around the time of writing."""
    for wait in (1.0, 2.0, 2.5, 3.0):
        process = subprocess.Popen(
            command("convert", tiny, str(tmp_path / "out")), cwd=REPOSITORY,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        time.sleep(wait)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        if left := list(tmp_path.iterdir()):  # it had been complete
            assert left == [tmp_path / "out"]
            assert open_checkpoint(left[0]).read("final_norm").shape == (64,)
            break
        assert process.returncode == 130


def test_interrupt_while_writing_leaves_nothing(tiny, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Tokenizer, "save", interrupt)
    assert main(["convert", tiny, str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "error: interrupted"
    assert list(tmp_path.iterdir()) == []


# A process with a limit on the size of files, which stands for a full disk.
_LIMITED = """
import resource, sys
from jaxinfer.cli.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
sys.exit(main())
"""


def test_a_disk_that_is_full_leaves_nothing(tiny, tmp_path):
    """One line, though the threads that write the weights go on when the first has failed."""
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, "convert", tiny, str(out), "--progress", "off"],
        capture_output=True, text=True, cwd=REPOSITORY, check=False,
    )  # fmt: skip
    assert done.stderr == f"error: cannot write {out}: File too large\n"
    assert (done.returncode, done.stdout) == (1, "")
    assert list(tmp_path.iterdir()) == []


def test_closed_pipe_is_no_error(long_context):
    """As in `jaxinfer generate … | head -c 1`."""
    process = subprocess.Popen(
        command("generate", "Hello", "--model", long_context, "--max-tokens", "200"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, env=os.environ,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.wait(timeout=60)
    process.stderr.close()
    assert "Traceback" not in err
    assert "Exception" not in err
