"""Which implementation each op of a model would get on a device, and why."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.models import functions
from jaxinfer.models.cache import PagedKVCache
from jaxinfer.models.config import DecoderConfig
from jaxinfer.models.decoder import Decoder
from jaxinfer.pallas_kernels.device import DeviceSpec, current_device, use_device
from jaxinfer.pallas_kernels.dispatch import OPS, Verdict, explain, parse_forced

_ROWS, _TOKENS, _CONTEXT = 8, 512, 4096


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OpChoice:
    """What one op would use.

    Attributes:
        op: Its name.
        phase: Where in the model it is called: `"prefill"`, `"chunked prefill"`, `"decode"`.
        implementation: The one that would run; empty if none can.
        verdicts: Every implementation in order of preference, with the reason of those refused.
        certain: False if a preferred one could not be judged on this machine.
    """

    op: str
    phase: str
    implementation: str
    verdicts: tuple[Verdict, ...]
    certain: bool


def op_choices(config: DecoderConfig, device: DeviceSpec, dtype: Any) -> list[OpChoice]:
    """Trace a model's phases, without weights, and ask every implementation.

    Args:
        config: The model's shape.
        device: What to plan for.
        dtype: Of weights and cache.
    """
    config = _one_layer_per_kind(config)
    model = jax.eval_shape(lambda: Decoder(config, dtype=dtype))
    cache = jax.eval_shape(
        lambda: PagedKVCache.create(config, batch_size=_ROWS, max_len=_CONTEXT, dtype=dtype)
    )
    phases = {
        "prefill": (functools.partial(functions.prefill, fresh=True), (_ROWS, _TOKENS)),
        "chunked prefill": (functools.partial(functions.prefill, fresh=False), (_ROWS, _TOKENS)),
        "decode": (functions.decode_step, (_ROWS,)),
    }
    found: dict[tuple[str, str], OpChoice] = {}
    for phase, (function, shape) in phases.items():
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
        with use_device(device), explain() as verdicts:
            # A new function each time: one that was traced before would not be asked again.
            jax.eval_shape(functools.partial(function), model, tokens, cache)
        for call in _calls(verdicts):
            choice = _choice(call, phase)
            # Layers of another kind may get another implementation: the more telling one stays.
            key = choice.op, phase
            if key not in found or len(_refused(choice)) > len(_refused(found[key])):
                found[key] = choice
    return list(found.values())


def check_implementation(name: str, config: DecoderConfig, dtype: Any) -> None:
    """Raise unless the ops of a model have an implementation and it can serve here.

    An op that lacks one meant for all keeps its own choice, so a misspelt name would go unnoticed.
    Only `xla`, and `cudnn` on a GPU, serve all calls: prefill has more tokens than `mosaic` takes
    in a product, and lengths and offsets, which `flash_attn3` and `tokamax` refuse.

    Args:
        name: As for `dispatch.parse_forced`.
        config: The model's shape.
        dtype: Of weights and cache.

    Raises:
        ValueError: no op has it, or one that has it cannot use it; the message says why.
    """
    for implementation, op in parse_forced(name):
        _check(implementation, op, config, jnp.dtype(dtype), current_device())


# The command line checks before weights are read, and `LLM` for everybody: traced once.
@functools.lru_cache
def _check(
    name: str, op: str | None, config: DecoderConfig, dtype: Any, device: DeviceSpec
) -> None:
    choices = op_choices(config, device, dtype)
    ops = sorted({choice.op for choice in choices})
    if op in OPS and op not in ops:
        raise ValueError(f"implementation names {op!r}, which this model does not call here")
    if op is not None and op not in ops:
        raise ValueError(f"implementation must name one of the ops {', '.join(ops)}; got {op!r}")
    verdicts = [v for c in choices if op in (None, c.op) for v in c.verdicts]
    known = sorted({verdict.implementation for verdict in verdicts})
    if name not in known:
        of = "implementation" if op is None else f"implementation of {op}"
        raise ValueError(f"{of} must be one of {', '.join(known)}; got {name!r}")
    for verdict in verdicts:
        if verdict.implementation == name and verdict.reason and op is not None:
            raise ValueError(
                f"implementation {name!r} of {op} cannot serve the model here: {verdict.reason}; "
                f"leave it out, or give one that can, as in '{op}=xla'"
            )
        if verdict.implementation == name and verdict.reason:
            raise ValueError(
                f"implementation {name!r} cannot serve a whole model here: {verdict.reason}; force "
                f"'xla', on a GPU also 'cudnn', or single ops as in 'matmul=xla'"
            )


def _one_layer_per_kind(config: DecoderConfig) -> DecoderConfig:
    kinds = tuple(sorted(set(config.local_layers)))
    return dataclasses.replace(config, num_layers=max(len(kinds), 1), local_layers=kinds)


def _calls(verdicts: list[Verdict]) -> list[list[Verdict]]:
    """Verdicts of one call each: a call begins with the implementation of rank 0."""
    calls: list[list[Verdict]] = []
    for verdict in verdicts:
        if verdict.rank == 0:
            calls.append([])
        calls[-1].append(verdict)
    return calls


def _choice(call: list[Verdict], phase: str) -> OpChoice:
    ranked = [verdict for verdict in call if verdict.rank is not None]
    # One that cannot be judged here is taken to work: this machine lacks the device, not the plan.
    taken = next((v for v in ranked if not v.reason or not v.certain), None)
    return OpChoice(
        op=call[0].op,
        phase=phase,
        implementation=taken.implementation if taken else "",
        verdicts=tuple(call),
        certain=taken is None or taken.certain,
    )


def _refused(choice: OpChoice) -> list[Verdict]:
    return [verdict for verdict in choice.verdicts if verdict.reason]
