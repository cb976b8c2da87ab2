"""Options that several commands share, and how they become arguments of the library.

Field docstrings of one line are the help texts (of longer ones tyro would keep the line breaks).
Nothing here imports jax: `--help` must be quick.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import UseAppendAction, arg

from jaxinfer.progress import Mode, Reporter

if TYPE_CHECKING:
    from jaxinfer.sampling_params import SamplingParams

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

Mesh = Annotated[
    str | None, arg(metavar="AXIS=SIZE,...", help_behavior_hint="(default: one device)")
]

_MODEL_DECIDES = "(default: the model's)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """How the command talks."""

    progress: Mode = "auto"
    """Bars on a terminal and lines elsewhere (auto), always lines (plain), or nothing (off)."""
    debug: bool = False
    """Show the whole traceback of an error."""

    def reporter(self) -> Reporter:
        """What shows progress, on standard error."""
        return Reporter(mode=self.progress)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """Which model, and how it is run."""

    model: str = "default"
    """GGUF file, model directory, Hub id, or "default" (SmolLM2-135M-Instruct, fetched once)."""
    dtype: Dtype = "auto"
    """Of weights and cache; auto: bfloat16 on a GPU, float32 on a CPU."""
    max_model_len: Annotated[int | None, arg(metavar="INT", help_behavior_hint=_MODEL_DECIDES)] = (
        None
    )
    """Longest prompt plus answer, tokens; less takes less memory."""
    gpu_memory_utilization: float = 0.9
    """Share of the GPU's memory for weights and KV cache."""
    num_gpu_blocks_override: Annotated[
        int | None, arg(metavar="INT", help_behavior_hint="(default: what memory allows)")
    ] = None
    """Pages of the KV cache, 64 tokens each."""
    implementation: Annotated[
        str | None,
        arg(
            metavar="STR",
            help_behavior_hint="(default: the best, see jaxinfer info)",
            help="Make every op that has it use this implementation: xla, or cudnn on a GPU; or "
            "name ops, as in matmul=xla,decode_attention=xla, to see what each is worth.",
        ),
    ] = None
    softmax: str = "online"
    """Of decode attention: online, unified, or a file of jaxinfer calibrate softmax."""
    mesh: Annotated[
        Mesh,
        arg(
            help="Devices that share the work, as tensor=2: parts of one model; or seq=4: parts of "
            "every prompt and of its cache; or data=2: copies of the model, each for requests of "
            "its own; or several of these, as data=1,seq=4,tensor=2.",
        ),
    ] = None

    def check(self) -> None:
        """Refuse sizes that suit no model, a mesh and a softmax, before one is fetched.

        Raises:
            ValueError: the message names the size.
        """
        check_mesh(self.mesh)
        from jaxinfer.calibration import softmax_calibration
        from jaxinfer.engine.config import check_sizes

        softmax_calibration(self.softmax)
        check_sizes(
            max_model_len=self.max_model_len,
            gpu_memory_utilization=self.gpu_memory_utilization,
            num_gpu_blocks_override=self.num_gpu_blocks_override,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen."""

    max_tokens: int = 256
    """Longest answer, tokens."""
    temperature: Annotated[
        float | None,
        arg(metavar="FLOAT", help_behavior_hint="(default: the model's recommendation, else 0)"),
    ] = None
    """Randomness: 0 always takes the likeliest token, 1 samples the model's distribution."""
    top_p: Annotated[
        float | None,
        arg(metavar="FLOAT", help_behavior_hint="(default: the model's recommendation, else 1)"),
    ] = None
    """Sample among the likeliest tokens that hold this share of the probability."""
    top_k: Annotated[
        int | None,
        arg(metavar="INT", help_behavior_hint="(default: the model's recommendation, else 0)"),
    ] = None
    """Sample among this many likeliest tokens; 0: all."""
    min_p: Annotated[
        float | None,
        arg(metavar="FLOAT", help_behavior_hint="(default: the model's recommendation, else 0)"),
    ] = None
    """Sample among tokens at least this many times as likely as the likeliest."""
    repetition_penalty: Annotated[
        float | None,
        arg(metavar="FLOAT", help_behavior_hint="(default: the model's recommendation, else 1)"),
    ] = None
    """Above 1 makes tokens that occurred before less likely."""
    seed: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: 0)")] = None
    """Same seed, same answer."""
    stop: UseAppendAction[tuple[str, ...]] = ()
    """End the answer at this text."""
    ignore_eos: bool = False
    """Go on after the model's end token."""

    def params(self, recommended: Mapping[str, Any]) -> "SamplingParams":
        """What the engine takes.

        Args:
            recommended: Fields of `SamplingParams` from the model's files; options override them.

        Raises:
            ValueError: a value out of range.
        """
        from jaxinfer.sampling_params import SamplingParams

        fields: dict[str, Any] = {"temperature": 0.0, **recommended}
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"):
            if (value := getattr(self, name)) is not None:
                fields[name] = value
        return SamplingParams(
            max_tokens=self.max_tokens,
            stop=list(self.stop) or None,
            ignore_eos=self.ignore_eos,
            **fields,
        )


def check_mesh(mesh: str | None, *, copies: bool = True) -> None:
    """Refuse a mesh that cannot be made here, before a model is fetched.

    Args:
        mesh: Sizes of its axes, or None.
        copies: Several copies of the model have something to do.

    Raises:
        ValueError: the message says what is wrong with it.
    """
    if mesh is not None:
        from jaxinfer.models.parallel.parallel import model_mesh  # with it comes JAX

        if (size := model_mesh(mesh).shape["data"]) > 1 and not copies:
            raise ValueError(f"one copy of the model is used here; leave out data={size}")
