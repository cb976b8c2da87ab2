"""Conversations: through a pipe, and through a terminal of our own."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import jax.numpy as jnp
import pytest

from jaxinfer.cli import chat
from jaxinfer.cli.main import main
from jaxinfer.models.checkpoint.orbax import save_orbax
from jaxinfer.models.config import DecoderConfig
from jaxinfer.models.decoder import Decoder
from jaxinfer.models.tokenizer.byte import byte_tokenizer
from tests.cli.command import REPOSITORY, command, run


def test_every_line_of_a_pipe_is_a_question(tiny, tmp_path):
    saved = tmp_path / "talk.json"
    lines = [
        "One", "", "Two", f"/save {saved}", "/undo", "Three", f"/save {saved}2", "/reset",
        "/undo", f"/save {saved}3", "/help", "/nonsense", "/save", "/save /absent/x", "/exit",
        "Four",
    ]  # fmt: skip
    done = run("chat", "--model", tiny, "--system", "S", "--max-tokens", "4",
               stdin="\n".join(lines) + "\n")  # fmt: skip
    assert done.returncode == 2, done.stderr  # of the first that failed, /nonsense

    def talk(name: str) -> list[str]:
        messages = json.loads((tmp_path / name).read_text())
        return [m["content"] for m in messages if m["role"] != "assistant"]

    assert talk("talk.json") == ["S", "One", "Two"]
    assert talk("talk.json2") == ["S", "One", "Three"]
    assert talk("talk.json3") == ["S"]
    assert "Ctrl-C stops an answer" in done.stdout
    assert done.stdout.count("The last question and answer are forgotten.") == 1
    assert done.stdout.count("There is nothing to forget.") == 1
    assert f"\n5 messages in {saved}\n" in done.stdout
    assert f"\n1 message in {saved}3\n" in done.stdout
    assert "unknown command /nonsense" in done.stderr
    assert "/save needs a file name" in done.stderr
    assert "cannot write /absent/x" in done.stderr
    assert done.stderr.count("first token after") == 3
    assert "\x1b" not in done.stdout
    assert "> " not in done.stdout


def test_a_conversation_that_grows_too_long(tiny):
    """The question is refused, the conversation stays usable."""
    done = run("chat", "--model", tiny, "--max-tokens", "4",
               stdin=f"One\n{'x' * 600}\nTwo\n")  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "; /reset or /undo makes room\n" in done.stderr
    assert ") (" not in done.stderr
    assert done.stderr.count("first token after") == 2


def test_an_answer_that_ends_at_once(tiny, tmp_path, monkeypatch, capsys):
    """It is said, and so is what becomes of the question."""
    options = ["--model", tiny, "--max-tokens", "1", "--progress", "off"]
    assert main(["generate", "One", "--json", *options]) == 0
    first = json.loads(capsys.readouterr().out)["token_ids"][0]
    model = Decoder(DecoderConfig.tiny(), dtype=jnp.float32)
    save_orbax(tmp_path / "model", model, tokenizer=byte_tokenizer(eos_id=first))
    lines = iter(["One", "/undo"])
    monkeypatch.setattr(chat, "_read_line", lambda: next(lines, None))
    assert main(["chat", "--model", str(tmp_path / "model"), "--max-tokens", "4"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{chat.NO_ANSWER}\nThere is nothing to forget.\n"
    assert "[1 token, first token after" in shown.err


def test_an_answer_that_is_stopped_before_it_begins(tiny, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    lines = iter(["One", "/undo"])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(chat, "_read_line", lambda: next(lines, None))
    monkeypatch.setattr(chat, "stream_answer", stop)
    assert main(["chat", "--model", tiny]) == 0
    shown = capsys.readouterr()
    assert shown.out == " [stopped]\nThere is nothing to forget.\n"
    assert "token" not in shown.err.partition("load: ")[2]


def test_an_interrupt_ends_a_conversation_through_a_pipe(long_context):
    """In an answer: nobody would notice that it was cut off, and the next is not asked for."""
    process = subprocess.Popen(
        command("chat", "--model", long_context, "--max-tokens", "19000", "--progress", "off"),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=REPOSITORY,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("One\nTwo\n")
    process.stdin.flush()
    assert process.stdout.read(1), process.communicate()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "error: interrupted\n")
    assert out.endswith("\n")
    assert "[stopped]" not in out


def test_a_question_that_is_not_utf8(tiny):
    """It is refused, the conversation goes on."""
    done = subprocess.run(
        command("chat", "--model", tiny, "--max-tokens", "4"), input=b"caf\xe9\nTwo\n",
        capture_output=True, cwd=REPOSITORY, check=False,
    )  # fmt: skip
    err = done.stderr.decode()
    assert done.returncode == 2, err
    assert [line for line in err.splitlines() if "error" in line] == [
        "error: the text is not valid Unicode: it holds U+DCE9, half of a surrogate pair, "
        "as Python makes of bytes that are not UTF-8"
    ]
    assert err.count("first token after") == 1


# Makes standard input the controlling terminal, so that ^C becomes a signal. (A preexec_fn would
# fork this process, which JAX's threads do not survive.)
_LAUNCH = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


class Terminal:
    """A process that believes it talks to a person."""

    def __init__(self, *arguments: str):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, *command(*arguments)],
            stdin=slave, stdout=slave, stderr=slave, cwd=REPOSITORY, start_new_session=True,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "200"},
        )  # fmt: skip
        os.close(slave)
        self.unread = ""

    def expect(self, text: str, seconds: float = 60) -> str:
        """Read on until a text has come; everything up to it."""
        self._read_until(lambda: text in self.unread, repr(text), seconds)
        before, _, self.unread = self.unread.partition(text)
        return before

    def wait_for(self, count: int, seconds: float = 60) -> None:
        """Read on until so many characters are waiting."""
        self._read_until(lambda: len(self.unread) >= count, f"{count} characters", seconds)

    def _read_until(self, done: Callable[[], bool], what: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, f"no {what} in {self.unread[-2000:]!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    piece = os.read(self.master, 4096).decode(errors="replace")
                except OSError:  # closed by the other side
                    piece = ""
                assert piece, f"ended before {what}: {self.unread[-2000:]!r}"
                self.unread += piece

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def close(self) -> int:
        """Wait for the end; the exit code."""
        return self.process.wait(timeout=30)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        """End the process if it goes on: after a failure nothing must hide that failure."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)


@pytest.mark.slow
def test_terminal(long_context, tmp_path):
    """Ctrl-C at the prompt and in an answer, then on with the conversation, then Ctrl-D."""
    with Terminal("chat", "--model", long_context, "--max-tokens", "19000") as terminal:
        assert "\x1b[" in terminal.expect("> ")  # the bar of loading
        terminal.type("half a line")
        terminal.expect("half a line")  # its echo: input is being read
        # CPython notices a signal that comes before it waits for a key only with the next key. A
        # person is not that quick; a machine must wait.
        time.sleep(0.3)
        terminal.type("\x03")
        terminal.expect("Ctrl-D leaves")
        terminal.expect("> ")
        terminal.type("Hello\n")
        terminal.expect("Hello\r\n")
        terminal.expect("\x1b[?25h")  # the bar of waiting ends, the answer begins
        terminal.wait_for(30)
        terminal.type("\x03")
        terminal.expect("[stopped]")
        terminal.expect("first token after")
        terminal.expect("> ")
        terminal.type(f"/save {tmp_path}/talk.json\n")
        terminal.expect("2 messages")
        terminal.type("/reset\n")
        terminal.expect("forgotten")
        terminal.expect("> ")
        terminal.type("\x04")
        code = terminal.close()
    assert code == 0
    messages = json.loads((tmp_path / "talk.json").read_text())
    assert [m["role"] for m in messages] == ["user", "assistant"]
    assert messages[0]["content"] == "Hello"
    assert messages[1]["content"]
