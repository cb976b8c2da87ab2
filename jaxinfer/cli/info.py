"""`jaxinfer info`: what is installed, what the machine has, and what every op would use."""

import dataclasses
import importlib.metadata
import json
import os
import platform
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from jaxinfer.cli.options import Output

if TYPE_CHECKING:
    from jaxinfer.op_choices import OpChoice
    from jaxinfer.pallas_kernels.device import DeviceSpec

EXAMPLES = """
jaxinfer info
jaxinfer info --device h100
jaxinfer info --model model.gguf --json
"""

_PACKAGES = (
    "jaxinfer", "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax",
    "orbax-checkpoint", "tokenizers", "huggingface-hub", "flash-attn3-jax", "tokamax",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Info(Output):
    """Show versions, devices, and which implementation every op would use and why."""

    device: Literal["current", "cpu", "h100", "h200"] = "current"
    """Plan for this device instead of the one that JAX found."""
    model: Annotated[
        str | None, arg(metavar="STR", help_behavior_hint="(default: shape of Llama-3-8B)")
    ] = None
    """Plan for this model: GGUF file, model directory, Hub id or "default"."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and cache; auto: bfloat16 on a GPU, float32 on a CPU."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        """Do it; the exit code."""
        values = self.collect()
        if self.json:
            print(json.dumps(values, indent=2))
        else:
            _print(values)
        return 0

    def collect(self) -> dict[str, Any]:
        """Everything that is shown, as JSON values."""
        import jax
        import jax.numpy as jnp

        from jaxinfer.cli.loading import find_devices
        from jaxinfer.default_model import DEFAULT_MODEL, cache_dir
        from jaxinfer.loading import dtype_name
        from jaxinfer.models.config import DecoderConfig
        from jaxinfer.op_choices import op_choices
        from jaxinfer.pallas_kernels import tuning

        find_devices()
        spec = _device(self.device)
        dtype = dtype_name(self.dtype, spec.platform)
        config, shape = DecoderConfig.llama3_8b(), "Llama-3-8B"
        if self.model is not None:
            from jaxinfer.cli.loading import fetch
            from jaxinfer.models.checkpoint.open import open_checkpoint

            config, shape = open_checkpoint(fetch(self.model, self.reporter())).config, self.model
        fetched = DEFAULT_MODEL.is_cached
        return {
            "python": platform.python_version(),
            "packages": _versions(),
            "devices": [_describe(device) for device in jax.devices()],
            "cache": str(cache_dir()),
            "default_model": {
                "title": DEFAULT_MODEL.title,
                "path": str(DEFAULT_MODEL.path),
                "fetched": fetched,
                "damaged": not fetched and os.path.exists(DEFAULT_MODEL.path),
            },
            "plan": {
                "device": spec.name,
                "injected": self.device != "current",
                "shape": shape,
                "dtype": dtype,
                "tuning": [
                    {"op": op, "file": str(file), "entries": len(tuning.load(file))}
                    for op in ("matmul", "decode_attention")
                    for file in tuning.files(op, spec)
                ],
                "ops": [_as_json(choice) for choice in op_choices(config, spec, jnp.dtype(dtype))],
            },
        }


def _device(name: str) -> "DeviceSpec":
    from jaxinfer.pallas_kernels import device

    known = {"cpu": device.CPU, "h100": device.H100, "h200": device.H200}
    return device.current_device() if name == "current" else known[name]


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _describe(device: Any) -> dict[str, Any]:
    from jaxinfer.pallas_kernels.device import from_jax

    spec = from_jax(device)
    stats = device.memory_stats() or {}
    return {
        "id": device.id,
        "platform": device.platform,
        "kind": device.device_kind,
        "capability": spec.capability / 10 or None,
        "num_sms": spec.num_sms if spec.platform == "gpu" else None,
        "memory_bytes": stats.get("bytes_limit"),
        "process": device.process_index,
    }


def _as_json(choice: "OpChoice") -> dict[str, Any]:
    return {
        "op": choice.op,
        "phase": choice.phase,
        "implementation": choice.implementation or None,
        "certain": choice.certain,
        "candidates": [
            {
                "implementation": verdict.implementation,
                "rank": verdict.rank,
                "supported": not verdict.reason if verdict.certain else None,
                "reason": verdict.reason or None,
            }
            for verdict in choice.verdicts
        ],
    }


def _print(values: dict[str, Any]) -> None:
    print(f"python {values['python']}")
    for name, version in values["packages"].items():
        print(f"{name} {version}")
    print("\ndevices")
    for device in values["devices"]:
        memory = device["memory_bytes"]
        parts = [device["platform"], device["kind"]]
        parts += [f"capability {device['capability']}"] if device["capability"] else []
        parts += [f"{device['num_sms']} SMs"] if device["num_sms"] else []
        parts += [f"{memory / 2**30:.1f} GiB for JAX"] if memory else []
        print(f"  {device['id']}: {', '.join(parts)}")
    model = values["default_model"]
    state = "is here" if model["fetched"] else "not fetched yet"
    if model["damaged"]:
        state = (
            "is damaged (its size or checksum is wrong): delete it, or let the next command that "
            "uses it fetch it anew"
        )
    print(f"\ndefault model {model['title']}: {state} ({model['path']})")
    plan = values["plan"]
    planned = " (not this machine's)" if plan["injected"] else ""
    print(f"\nops of {plan['shape']}, {plan['dtype']}, on {plan['device']}{planned}")
    for data in plan["tuning"]:
        if data["entries"]:
            print(f"  measured choices of {data['op']}: {data['entries']} from {data['file']}")
    for op in plan["ops"]:
        print(f"  {op['op']}, {op['phase']}: {op['implementation'] or 'none can serve it'}")
        for candidate in op["candidates"]:
            print(f"    {candidate['implementation']:12} {_why(candidate, op)}")


def _why(candidate: dict[str, Any], op: dict[str, Any]) -> str:
    if candidate["supported"] is None:
        start = "taken" if candidate["implementation"] == op["implementation"] else "unknown"
        return f"{start}, but cannot be checked on this machine: {candidate['reason']}"
    if not candidate["supported"]:
        # "attention[cudnn] does not support …": op and name are already on the line.
        return "no: " + candidate["reason"].partition("] does not support ")[2]
    if candidate["implementation"] == op["implementation"]:
        return "taken: first in order that can serve the call"
    rank = candidate["rank"]
    return (
        "can serve the call; only by name" if rank is None else "can serve the call; later in order"
    )
