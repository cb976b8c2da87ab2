"""What process 0 decides and the other processes follow."""

import dataclasses
from typing import TYPE_CHECKING, Any

from jaxinfer.cli.loading import open_model
from jaxinfer.cli.options import Model
from jaxinfer.progress import Reporter

if TYPE_CHECKING:
    from jaxinfer.distributed.group import Group
    from jaxinfer.llm import LLM
    from jaxinfer.models.checkpoint.base import Checkpoint
    from jaxinfer.models.tokenizer.tokenizer import Tokenizer
    from jaxinfer.sampling_params import SamplingParams


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that the engine's decisions depend on.

    Attributes:
        model: How the model is run; where its files are, every process says for itself.
        params: How to sample.
        prompts: Tokens of each.
        streams: There is one prompt, and its answer is streamed.
    """

    model: Model
    params: "SamplingParams"
    prompts: list[list[int]]
    streams: bool


def whole_mesh() -> str:
    """All devices of all processes."""
    import jax

    return f"tensor={jax.device_count()}"


def give(group: "Group", plan: Plan, checkpoint: "Checkpoint") -> None:
    """Hand out the plan of process 0; it also holds what `checkpoint` is."""
    group.share({
        "same": _same(checkpoint),
        "model": dataclasses.asdict(plan.model),
        "params": dataclasses.asdict(plan.params),
        "prompts": [[int(token) for token in prompt] for prompt in plan.prompts],
        "streams": plan.streams,
    })  # fmt: skip


def take(group: "Group", own: Model, reporter: Reporter) -> tuple["Checkpoint", "Tokenizer", Plan]:
    """The plan of process 0 for a process that follows, and its own files of the model.

    Raises:
        ValueError: they are of another model, or programs have other versions.
    """
    from jaxinfer.sampling_params import SamplingParams

    # First the plan: where processes share a home, process 0 has fetched the model by then.
    values: dict[str, Any] = group.share()
    checkpoint, tokenizer = open_model(own.model, reporter)
    for what, value in _same(checkpoint).items():
        if values["same"][what] != value:
            raise ValueError(
                f"{what} differs: process 0 has {values['same'][what]}, "
                f"process {group.index} has {value}"
            )
    model = Model(**(values["model"] | {"model": own.model}))
    params = SamplingParams(**values["params"])
    return checkpoint, tokenizer, Plan(model, params, values["prompts"], values["streams"])


def check_sizes(group: "Group", llm: "LLM") -> None:
    """Refuse an engine that would not decide as that of process 0 does.

    Raises:
        ValueError: its sizes are others.
    """
    group.check_equal("the engine", str(llm.engine.config))


def _same(checkpoint: "Checkpoint") -> dict[str, str]:
    import importlib.metadata

    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jaxinfer", "jax")]
    return {"the version": ", ".join(versions), "the model": str(checkpoint.config)}
