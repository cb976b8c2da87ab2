"""`jaxinfer convert`: any model that can be read, as an Orbax checkpoint."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from jaxinfer.cli import interrupts
from jaxinfer.cli.errors import UsageError
from jaxinfer.cli.loading import load_weights, open_model
from jaxinfer.cli.options import Output

EXAMPLES = """
jaxinfer convert model.gguf smollm2
jaxinfer convert HuggingFaceTB/SmolLM2-360M-Instruct smollm2-360m --dtype float32
jaxinfer generate "Hello" --model smollm2
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert(Output):
    """Write a model as an Orbax checkpoint.

    Its weights are stored dequantised, in one dtype, and a device reads only its part of them.
    """

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """GGUF file, model directory, Hugging Face Hub id, or "default"."""
    out: Annotated[Positional[str], arg(metavar="OUT")]
    """Directory to create."""
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """Of the stored weights; float32 keeps every bit of a dequantised GGUF file."""

    def run(self) -> int:
        """Do it; the exit code."""
        if not self.out:
            raise UsageError("OUT is empty; name a directory to create")
        from jaxinfer.models.checkpoint.orbax import check_target, save_orbax

        out = Path(self.out)
        try:
            check_target(out)  # before anything is downloaded or read
        except OSError as error:
            raise UsageError(_unwritable(out, error)) from error
        reporter = self.reporter()
        checkpoint, tokenizer = open_model(self.model, reporter)
        model = load_weights(checkpoint, self.dtype, reporter)
        try:
            with interrupts.ended_cleanly(), reporter.task("write"):
                save_orbax(out, model, tokenizer=tokenizer, generation=checkpoint.generation)
        except OSError as error:
            raise RuntimeError(_unwritable(out, error)) from error
        size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        print(f"{out}: {model.config.num_parameters / 1e6:.0f} M parameters, "
              f"{self.dtype}, {size / 1e6:.0f} MB")  # fmt: skip
        return 0


def _unwritable(out: Path, error: OSError) -> str:
    return f"cannot write {out}: {error.strerror}" if error.strerror else str(error)
