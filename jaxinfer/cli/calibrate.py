"""`jaxinfer calibrate`: what a model's numbers look like on a text."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from jaxinfer.cli.answer import counted
from jaxinfer.cli.errors import UsageError
from jaxinfer.cli.eval import read_text
from jaxinfer.cli.loading import load_weights, open_model
from jaxinfer.cli.options import Dtype, Output

if TYPE_CHECKING:
    from jaxinfer.calibration import SoftmaxCalibration

EXAMPLES = """
jaxinfer calibrate softmax default --text book.txt
jaxinfer calibrate softmax model.gguf --text book.txt --out model-softmax.json
jaxinfer calibrate softmax default --text book.txt --max-tokens 4096 --json
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibrate(Output):
    """Note where the attention logits of every layer and head lie, in a file.

    Decode attention may then use one softmax reference per head instead of a running maximum. Heads
    whose logits range too widely are named, and their layers keep the running maximum; the file
    says so too.
    """

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """GGUF file, model directory, Hugging Face Hub id, or "default"."""
    text: Annotated[str, arg(metavar="FILE")]
    """UTF-8 text like what the model will see; - reads standard input."""
    out: Annotated[Path, arg(metavar="FILE")] = Path("softmax.json")
    """Where the result goes; a file that is there is replaced."""
    window: int = 512
    """Tokens that attend to each other; the end of a text that fills no window is left out."""
    max_tokens: Annotated[
        int | None, arg(metavar="INT", help_behavior_hint="(default: all that fill windows)")
    ] = None
    """Use only the first tokens of the text."""
    dtype: Annotated[
        Dtype,
        arg(
            help="Of weights and cache, and of the model that will use the result; auto: bfloat16 "
            "on a GPU, float32 on a CPU, which serve each other. float16 trusts sums in a narrow "
            "range only.",
        ),
    ] = "auto"
    json: bool = False
    """Print the result as JSON too."""

    def run(self) -> int:
        """Do it; the exit code."""
        text = read_text(self.text)
        if self.window < 2 or (self.max_tokens is not None and self.max_tokens < 2):
            raise UsageError("--window and --max-tokens must be at least 2")
        if self.out.is_dir():
            raise UsageError(f"{self.out} is a folder: name a file")
        if not self.out.parent.is_dir():
            raise UsageError(f"{self.out.parent} is not a folder")
        from jaxinfer.calibration import calibrate_softmax, check_input, check_target

        try:
            check_target(self.out)  # before anything is downloaded or computed
        except OSError as error:
            raise UsageError(f"cannot write {self.out}: {error.strerror}") from error
        reporter = self.reporter()
        checkpoint, tokenizer = open_model(self.model, reporter)
        ids = tokenizer.encode(text)
        check_input(checkpoint.config, ids, self.window)  # before weights are read
        model = load_weights(checkpoint, self.dtype, reporter)
        with reporter.task("calibrate", unit="tokens") as progress:
            found = calibrate_softmax(
                model, ids, name=checkpoint.path, window=self.window,
                max_tokens=self.max_tokens, progress=progress,
            )  # fmt: skip
        try:
            found.save(self.out)
        except OSError as error:
            raise RuntimeError(f"cannot write {self.out}: {error.strerror}") from error
        if self.json:
            print(json.dumps(found.as_dict()))
            return 0
        print("\n".join(table(found)))
        used = f"{found.tokens} of {counted(len(ids), 'token')}, in windows of {found.window}"
        print(f"{used}; written to {self.out}")
        return 0


def table(found: "SoftmaxCalibration") -> list[str]:
    """A line per layer, and the verdict."""
    lines = ["layer      logits            logarithms of sums   inside  verdict"]
    for i, layer in enumerate(found.layers):
        wide = ", ".join(map(str, layer.wide_heads(found.dtype)))
        verdict = f"online: heads {wide} range too widely" if wide else "unified"
        lines.append(
            f"{i:5d}  {min(layer.low):7.1f} … {max(layer.high):7.1f}"
            f"  {min(layer.sum_low):8.1f} … {max(layer.sum_high):7.1f}"
            f"  {min(layer.inside):7.2%}  {verdict}"
        )
    fitting = sum(not layer.wide_heads(found.dtype) for layer in found.layers)
    return [*lines, f"one reference per head serves {fitting} of {len(found.layers)} layers"]
