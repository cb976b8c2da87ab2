"""`jaxinfer eval`: how good a model is."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from jaxinfer.cli import streams
from jaxinfer.cli.answer import counted
from jaxinfer.cli.errors import UsageError
from jaxinfer.cli.loading import load_weights, open_model
from jaxinfer.cli.options import Dtype, Mesh, Output, check_mesh

EXAMPLES = """
jaxinfer eval perplexity default --text book.txt
jaxinfer eval perplexity model.gguf --text book.txt --window 4096 --stride 512
jaxinfer eval perplexity default --text book.txt --max-tokens 20000 --json
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval(Output):
    """Measure how well a model predicts a text.

    The text is read in overlapping windows; every token but the first is scored once. Memory does
    not grow with the text.
    """

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """GGUF file, model directory, Hugging Face Hub id, or "default"."""
    text: Annotated[str, arg(metavar="FILE")]
    """UTF-8 text file; - reads standard input."""
    window: Annotated[
        int | None, arg(metavar="INT", help_behavior_hint="(default: 2048, or the model's context)")
    ] = None
    """Context and prediction together, tokens."""
    stride: Annotated[
        int | None, arg(metavar="INT", help_behavior_hint="(default: half a window)")
    ] = None
    """Tokens by which the window moves: less is slower and gives more context."""
    batch_size: int = 1
    """Windows that are computed together."""
    max_tokens: Annotated[
        int | None, arg(metavar="INT", help_behavior_hint="(default: the whole text)")
    ] = None
    """Use only the first tokens of the text."""
    dtype: Dtype = "auto"
    """Of weights and cache; auto: bfloat16 on a GPU, float32 on a CPU."""
    mesh: Mesh = None
    """Devices that share the model, as tensor=2."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        """Do it; the exit code."""
        text = read_text(self.text)
        from jaxinfer.evaluation import check_input, check_sizes, evaluate_perplexity

        # Before anything is downloaded.
        check_sizes(self.window, self.stride, self.batch_size, self.max_tokens)
        check_mesh(self.mesh, copies=False)
        reporter = self.reporter()
        checkpoint, tokenizer = open_model(self.model, reporter)
        # Before weights are read; of the text its beginning is enough.
        check_input(checkpoint.config, tokenizer.encode(text[:4096]), self.window, self.stride)
        model = load_weights(checkpoint, self.dtype, reporter, self.mesh)
        with reporter.task("evaluate", unit="tokens") as progress:
            result = evaluate_perplexity(
                model, tokenizer, text, window=self.window, stride=self.stride,
                batch_size=self.batch_size, max_tokens=self.max_tokens, progress=progress,
            )  # fmt: skip
        values = {
            "perplexity": result.perplexity,
            "nll": result.nll,
            "bits_per_byte": result.bits_per_byte,
            "tokens": result.num_tokens,
            "bytes": result.num_bytes,
            "window": result.window,
            "stride": result.stride,
            "dtype": model.embed[...].dtype.name,
            "seconds": result.seconds,
            "tokens_per_second": result.tokens_per_second,
        }
        if self.json:
            print(json.dumps({"model": checkpoint.path, "text": self.text, **values}))
            return 0
        print(f"perplexity     {result.perplexity:.4f}")
        print(f"nll per token  {result.nll:.5f} nats")
        print(f"bits per byte  {result.bits_per_byte:.4f}")
        print(
            f"{counted(result.num_tokens, 'token')}, {counted(result.num_bytes, 'byte')}; "
            f"window {result.window}, stride {result.stride}, {values['dtype']}; "
            f"{result.seconds:.1f} s, {result.tokens_per_second:.0f} tokens/s"
        )
        return 0


def read_text(name: str) -> str:
    """The text of a file, or of standard input for `-`.

    Raises:
        UsageError: the file is missing, unreadable, empty or not UTF-8.
    """
    try:
        data = streams.read_stdin() if name == "-" else Path(name).read_bytes()
        text = data.decode().removeprefix("\ufeff")  # a byte-order mark is no text
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UsageError(f"cannot read {name}: {error.strerror}") from None
    if not text.strip():
        raise UsageError(f"{name} is empty")
    return text
