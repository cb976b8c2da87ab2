"""`jaxinfer generate`: answers to prompts."""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from jaxinfer.cli import plan, streams
from jaxinfer.cli.answer import Answer, counted, naming, stream_answer
from jaxinfer.cli.errors import UsageError
from jaxinfer.cli.loading import open_model, start_engine
from jaxinfer.cli.options import Model, Output, Sampling
from jaxinfer.cli.processes import Processes
from jaxinfer.progress import CompileWatch, Reporter

if TYPE_CHECKING:
    from jaxinfer.distributed.group import Group
    from jaxinfer.llm import LLM
    from jaxinfer.models.tokenizer.tokenizer import Tokenizer
    from jaxinfer.outputs import RequestOutput
    from jaxinfer.sampling_params import SamplingParams

EXAMPLES = """
jaxinfer generate "Why is the sky blue?"
jaxinfer generate --raw "Once upon a time" --max-tokens 50 --temperature 0.8 --seed 1
cat question.txt | jaxinfer generate - --model model.gguf
jaxinfer generate "One?" "Two?" "Three?" --json
srun jaxinfer generate "Why is the sky blue?" --distributed
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Output):
    """Answer prompts: one is streamed, several are computed together.

    The answer goes to standard output; progress, speed and errors go to standard error.
    """

    prompts: Annotated[
        Positional[tuple[str, ...]], arg(metavar="PROMPT...", help_behavior_hint="")
    ] = ()
    """Prompts; - reads one from standard input."""
    chat: Annotated[
        bool, arg(help_behavior_hint="(default: for models that have one, not with --raw)")
    ] = False
    """Ask in the model's chat format."""
    raw: bool = False
    """Continue the prompt as plain text."""
    system: str = ""
    """System message in front of the prompt."""
    json: bool = False
    """Print one JSON object per prompt, when all are answered."""
    no_stream: bool = False
    """Print an answer when it is complete."""
    model: Model = dataclasses.field(default_factory=Model)
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    processes: Processes = dataclasses.field(default_factory=Processes)

    def run(self) -> int:
        """Do it; the exit code."""
        # Wrong values are found before anything is downloaded.
        self.sampling.params({})
        with self.processes.joined(debug=self.debug, say=self.reporter().note) as group:
            if group is None or group.is_first:
                self._lead(group)
            else:
                self._follow(group)
        return 0

    def _lead(self, group: "Group | None") -> None:
        """Answer, and let the other processes compute the same."""
        model = self.model
        if group is not None and model.mesh is None:
            model = dataclasses.replace(model, mesh=plan.whole_mesh())
        model.check()
        prompts = self._read_prompts()
        reporter = self.reporter()
        checkpoint, tokenizer = open_model(model.model, reporter)
        params = self.sampling.params(checkpoint.generation.sampling)
        from jaxinfer.engine.sizing import context_length

        limit = context_length(model.max_model_len, checkpoint.config)
        as_chat = self._as_chat(tokenizer, reporter)
        ids = self._tokens(tokenizer, prompts, as_chat=as_chat, limit=limit)
        streams = len(prompts) == 1 and not self.json and not self.no_stream
        if group is not None:
            plan.give(group, plan.Plan(model, params, ids, streams), checkpoint)
        llm = start_engine(checkpoint, tokenizer, model, reporter)
        if group is not None:
            plan.check_sizes(group, llm)
        if streams:
            with naming(prompts):
                _stream(llm, ids[0], params, reporter, _write)
        else:
            with naming(prompts):
                outputs = _batch(llm, ids, params, reporter)
            for prompt, output in zip(prompts, outputs, strict=True):
                self._show(prompt, output, several=len(prompts) > 1)

    def _follow(self, group: "Group") -> None:
        """Compute what process 0 computes, and write nothing."""
        reporter = Reporter(mode="off")
        checkpoint, tokenizer, received = plan.take(group, self.model, reporter)
        llm = start_engine(checkpoint, tokenizer, received.model, reporter)
        plan.check_sizes(group, llm)
        if received.streams:
            _stream(llm, received.prompts[0], received.params, reporter, lambda _: None)
        else:
            _batch(llm, received.prompts, received.params, reporter)

    def _read_prompts(self) -> list[str]:
        if self.chat and self.raw:
            raise UsageError("--chat and --raw exclude each other")
        if self.raw and self.system:
            raise UsageError("--system needs the chat format; leave out --raw")
        if not self.prompts:
            raise UsageError('a prompt is needed: jaxinfer generate "…", or - for standard input')
        if self.prompts.count("-") > 1:
            raise UsageError("standard input (-) can be read only once")
        prompts = [_read_stdin() if prompt == "-" else prompt for prompt in self.prompts]
        for number, prompt in enumerate(prompts, start=1):
            if not prompt.strip():
                raise UsageError(f"prompt {number} is empty")
        return prompts

    def _as_chat(self, tokenizer: "Tokenizer", reporter: Reporter) -> bool:
        """Whether prompts are questions; says so where they are not although nobody asked."""
        if self.raw:
            return False
        if tokenizer.chat_template is not None:
            return True
        from jaxinfer.models.tokenizer.tokenizer import NO_CHAT_TEMPLATE

        if asked := ["--chat"] * self.chat + ["--system"] * bool(self.system):
            raise UsageError(f"{NO_CHAT_TEMPLATE}; leave out {' and '.join(asked)}")
        reporter.note(f"{NO_CHAT_TEMPLATE}: prompts are continued as plain text")
        return False

    def _tokens(
        self, tokenizer: "Tokenizer", prompts: list[str], *, as_chat: bool, limit: int
    ) -> list[list[int]]:
        """Prompts as tokens; what is wrong with one is found before weights are read."""
        from jaxinfer.engine.admission import about, check_length

        tokens = []
        for number, prompt in enumerate(prompts, start=1):
            with about(f"prompt {number}" if len(prompts) > 1 else ""):
                tokens.append(self._encode(tokenizer, prompt, as_chat=as_chat))
                check_length(len(tokens[-1]), limit)
        return tokens

    def _encode(self, tokenizer: "Tokenizer", prompt: str, *, as_chat: bool) -> list[int]:
        if not as_chat:
            return tokenizer.encode(prompt)
        messages = [{"role": "system", "content": self.system}] if self.system else []
        return tokenizer.apply_chat_template([*messages, {"role": "user", "content": prompt}])

    def _show(self, prompt: str, output: "RequestOutput", *, several: bool) -> None:
        completion = output.outputs[0]
        if not self.json:
            print(f"## {prompt}\n{completion.text}\n" if several else completion.text)
            return
        values: dict[str, Any] = {
            "prompt": prompt,
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "token_ids": list(completion.token_ids),
            "prompt_tokens": len(output.prompt_token_ids),
        }
        print(json.dumps(values, ensure_ascii=not streams.stdout_is_unicode()))


def _read_stdin() -> str:
    try:
        text = streams.read_stdin().decode("utf-8-sig")  # without a byte-order mark
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not UTF-8 text (byte {error.start})") from None
    # Without the line end that echo and editors put there, as $(…) does.
    return text.removesuffix("\r\n") if text.endswith("\r\n") else text.removesuffix("\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _stream(
    llm: "LLM",
    ids: list[int],
    params: "SamplingParams",
    reporter: Reporter,
    write: Callable[[str], None],
) -> None:
    answer = Answer()
    try:
        stream_answer(llm, ids, params, write, reporter, answer)
    finally:
        if answer.text:
            write("\n")
    reporter.note(answer.speed())


def _batch(
    llm: "LLM", ids: list[list[int]], params: "SamplingParams", reporter: Reporter
) -> list["RequestOutput"]:
    start = time.perf_counter()
    with (
        reporter.task("generate", unit="answers", quiet=True) as progress,
        CompileWatch() as watch,
    ):
        outputs = llm.generate(ids, params, use_tqdm=progress)
    seconds = time.perf_counter() - start
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    computing = max(seconds - watch.seconds, 1e-9)
    reporter.note(
        f"{counted(len(ids), 'prompt')}, {counted(tokens, 'token')} in {seconds:.1f} s "
        f"({watch.seconds:.1f} s compiling), {tokens / computing:.1f} tokens/s"
    )
    return outputs
