"""Standard streams that are closed, full, or of a narrow encoding."""

import json
import os
import shlex
import subprocess

import pytest

from tests.cli.command import REPOSITORY, command, kept_programs


def shell(redirections: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run `jaxinfer …` as a shell does with redirections."""
    line = f"{shlex.join(command(*arguments))} {redirections}"
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, cwd=REPOSITORY, timeout=120,
        env=os.environ | kept_programs(os.environ) | environment, check=False,
    )  # fmt: skip


def test_a_closed_standard_output(tiny):
    for arguments in (["generate", "Hi", "--model", tiny], ["--version"], ["info"]):
        done = shell(">&-", *arguments)
        assert (
            done.stderr == "error: standard output is closed; > /dev/null drops what goes there\n"
        )
        assert done.returncode == 2


def test_a_closed_standard_error_drops_what_goes_there(tiny):
    done = shell("2>&-", "generate", "Hi", "--model", tiny, "--max-tokens", "4")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\n")
    done = shell("2>&-", "generate", "Hi", "--model", "/absent")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


@pytest.mark.parametrize(
    "arguments",
    [["generate", "-"], ["chat"], ["eval", "perplexity", "/absent", "--text", "-"]],
    ids=lambda arguments: arguments[0],
)
def test_a_closed_standard_input(arguments, tiny):
    model = [] if arguments[0] == "eval" else ["--model", tiny]
    done = shell("<&-", *arguments, *model)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: standard input is closed\n"


def test_a_disk_that_takes_nothing(tiny):
    done = shell("> /dev/full", "generate", "Hi", "--model", tiny, "--progress", "off")
    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")


def test_an_encoding_that_lacks_characters(tiny):
    """Replaced in text, escaped in JSON."""
    ascii_only = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    options = ("--model", tiny, "--max-tokens", "24", "--progress", "off")
    plain = shell("", "generate", "Hi", "é", *options, **ascii_only)
    assert (plain.returncode, plain.stderr) == (0, "")
    assert plain.stdout.isascii()
    assert "## ?\n" in plain.stdout
    whole = shell("", "generate", "Hi", "--json", *options)
    escaped = shell("", "generate", "Hi", "--json", *options, **ascii_only)
    assert escaped.stdout.isascii()
    assert json.loads(escaped.stdout) == json.loads(whole.stdout)
