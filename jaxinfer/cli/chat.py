"""`jaxinfer chat`: a conversation in the terminal."""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jaxinfer.cli import streams
from jaxinfer.cli.answer import Answer, counted, naming, stream_answer
from jaxinfer.cli.errors import BAD_INPUT, UsageError, exit_code, one_line
from jaxinfer.cli.loading import open_model, start_engine
from jaxinfer.cli.options import Model, Output, Sampling
from jaxinfer.errors import ContextLengthError, KVCacheFullError
from jaxinfer.progress import Reporter

if TYPE_CHECKING:
    from jaxinfer.llm import LLM
    from jaxinfer.models.tokenizer.tokenizer import Tokenizer
    from jaxinfer.sampling_params import SamplingParams

EXAMPLES = """
jaxinfer chat
jaxinfer chat --system "Answer in one sentence." --temperature 0.7
jaxinfer chat --model Qwen/Qwen2.5-0.5B-Instruct
"""

HELP = """\
/help        this list
/reset       forget the conversation (the system message stays)
/undo        forget the last question and answer
/save FILE   write the conversation as JSON
/exit        leave; so does Ctrl-D
Ctrl-C stops an answer and keeps what came of it."""

NO_ANSWER = "[the model gave no answer; the question is not kept]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat(Output):
    """Talk with a model: Ctrl-C stops an answer, Ctrl-D leaves, /help lists commands.

    Where standard input is not a terminal, every line of it is one question, and Ctrl-C leaves.
    """

    system: str = ""
    """System message in front of the conversation."""
    model: Model = dataclasses.field(default_factory=Model)
    sampling: Sampling = dataclasses.field(default_factory=Sampling)

    def run(self) -> int:
        """Talk until the end of input; the exit code, of a pipe the first failure's."""
        # Wrong values are found before anything is downloaded.
        streams.check_stdin()
        self.sampling.params({})
        self.model.check()
        reporter = self.reporter()
        checkpoint, tokenizer = open_model(self.model.model, reporter)
        if tokenizer.chat_template is None:
            from jaxinfer.models.tokenizer.tokenizer import NO_CHAT_TEMPLATE

            raise UsageError(f"{NO_CHAT_TEMPLATE}; use jaxinfer generate --raw")
        params = self.sampling.params(checkpoint.generation.sampling)
        from jaxinfer.engine.sizing import context_length

        context_length(self.model.max_model_len, checkpoint.config)  # before weights are read
        tokenizer.encode(self.system)  # what is no text is refused once, not at every question
        llm = start_engine(checkpoint, tokenizer, self.model, reporter)
        talk = Conversation(llm, tokenizer, params, reporter, system=self.system)
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (line editing and history for input())
            reporter.note("Ctrl-C stops an answer, Ctrl-D leaves, /help lists commands.")
        while (line := _read_line()) is not None:
            if not talk.handle(line):
                break
        return 0 if sys.stdin.isatty() else talk.exit_code


class Conversation:
    """Messages so far, and what a line of input does to them.

    Attributes:
        messages: As for `LLM.chat`.
        exit_code: Of the first line that failed; 0 if none has.
    """

    def __init__(
        self,
        llm: "LLM",
        tokenizer: "Tokenizer",
        params: "SamplingParams",
        reporter: Reporter,
        *,
        system: str = "",
    ):
        """Begin, with a system message if it is not empty."""
        self._llm, self._tokenizer, self._params = llm, tokenizer, params
        self._reporter = reporter
        self._opening = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = list(self._opening)
        self.exit_code = 0

    def handle(self, line: str) -> bool:
        """Answer a question or obey a command; False to leave."""
        line = line.strip()
        if line.startswith("/"):
            return self._command(line)
        if line:
            self._ask(line)
        return True

    def _command(self, line: str) -> bool:
        name, _, rest = line.partition(" ")
        match name:
            case "/exit" | "/quit":
                return False
            case "/help":
                print(HELP)
            case "/reset":
                self.messages = list(self._opening)
                print("The conversation is forgotten.")
            case "/undo":
                print(self._undo())
            case "/save":
                self._save(rest.strip())
            case _:
                self._fail(f"unknown command {name}; /help lists them", BAD_INPUT)
        return True

    def _fail(self, text: str, code: int) -> None:
        print(text, file=sys.stderr)
        self.exit_code = self.exit_code or code

    def _undo(self) -> str:
        if len(self.messages) == len(self._opening):
            return "There is nothing to forget."
        del self.messages[-2:]
        return "The last question and answer are forgotten."

    def _ask(self, question: str) -> None:
        """Stream an answer. Errors, and no answer, leave the conversation as it was.

        Raises:
            KeyboardInterrupt: Ctrl-C, where nobody is there to ask something else instead.
        """
        asked = [*self.messages, {"role": "user", "content": question}]
        answer = Answer()
        try:
            ids = self._tokenizer.apply_chat_template(asked)
            with naming([question]):
                stream_answer(self._llm, ids, self._params, _write, self._reporter, answer)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                if answer.text:
                    _write("\n")
                raise
            _write(" [stopped]")
        except ValueError as error:  # too long, no text, or refused by the template
            if answer.text:
                _write("\n")
            full = isinstance(error, ContextLengthError | KVCacheFullError)
            can_make_room = full and len(self.messages) > len(self._opening)
            hint = "; /reset or /undo makes room" if can_make_room else ""
            self._fail(f"error: {one_line(error)}{hint}", exit_code(error))
            return
        ended = answer.finish_reason is not None  # by itself, not by Ctrl-C
        if ended and not answer.text:
            _write(NO_ANSWER)
        _write("\n")
        if answer.text:
            self.messages = [*asked, {"role": "assistant", "content": answer.text}]
        if answer.text or ended:
            self._reporter.note(f"[{answer.speed()}]")

    def _save(self, name: str) -> None:
        if not name:
            self._fail("/save needs a file name", BAD_INPUT)
            return
        try:
            text = json.dumps(self.messages, indent=2, ensure_ascii=False)
            Path(name).expanduser().write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            self._fail(f"error: cannot write {name}: {error.strerror}", exit_code(error))
        else:
            print(f"{counted(len(self.messages), 'message')} in {name}")


def _read_line() -> str | None:
    """The next line; None at the end of input. Ctrl-C at the prompt drops the line."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "").removeprefix("\ufeff")
        except EOFError:
            if sys.stdin.isatty():
                print()
            return None
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print("\n(Ctrl-D leaves)")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
