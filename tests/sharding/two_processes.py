"""One of two processes that answer together; run by `test_two_processes.py`.

Arguments: its number, the address of the first, and a folder of models. Prints a JSON object.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxinfer.distributed import watched
from jaxinfer.engine.sizing import least_of_processes
from jaxinfer.llm import LLM
from jaxinfer.models.checkpoint.open import load_model, open_checkpoint
from jaxinfer.models.config import DecoderConfig
from jaxinfer.models.decoder import Decoder
from jaxinfer.sampling_params import SamplingParams

CONFIG = DecoderConfig.tiny(num_layers=1, num_heads=9, num_kv_heads=3, tie_embeddings=True)
PROMPTS = [[(5 * i) % 250 for i in range(40)], [7] * 9]
PARAMS = [
    SamplingParams(temperature=1.0, seed=3, max_tokens=12, repetition_penalty=1.2, logprobs=2),
    SamplingParams(temperature=0, max_tokens=12, prompt_logprobs=1),
]


def answers(mesh: str | Mesh | None) -> list[list[int]]:
    model = Decoder(CONFIG, dtype=jnp.float32, mesh=mesh)
    llm = LLM((model, None), max_num_seqs=2, max_num_batched_tokens=32, block_size=16)
    return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, PARAMS)]


class Watched:
    """An array in a file, which counts what is read of it."""

    def __init__(self, array: Any, count: dict[str, int]):
        self.shape, self._array, self._count = array.shape, array, count
        self._count["all"] += int(np.prod(self.shape))

    def __getitem__(self, index: Any) -> np.ndarray:
        part = self._array[index]
        self._count["read"] += part.size
        return part

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        return self[...]


def share_that_is_read(path: Path, mesh: str) -> tuple[float, float]:
    """Share of a model's numbers that this process reads; and a sum of what its devices have."""
    checkpoint, count = open_checkpoint(path), {"all": 0, "read": 0}
    name = "read_part" if hasattr(checkpoint, "read_part") else "read"
    read = getattr(checkpoint, name)
    setattr(checkpoint, name, lambda weight: Watched(read(weight), count))
    model = load_model(checkpoint, dtype=jnp.float32, mesh=mesh)
    total = 0.0
    for array in jax.tree.leaves(model):
        if not array.sharding.is_fully_replicated:
            parts = {str(shard.index): shard.data for shard in array.addressable_shards}
            total += sum(np.abs(np.asarray(part, np.float64)).sum() for part in parts.values())
    return count["read"] / count["all"], total


if __name__ == "__main__":
    number, address = int(sys.argv[1]), sys.argv[2]
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(coordinator_address=address, num_processes=2, process_id=number)
    found: dict[str, object] = {"devices": jax.device_count()}
    with watched():
        found["answers"] = answers("tensor=4")
        found["least"] = least_of_processes(7 + number)
    found["refused"] = refused = []
    for mesh in ("tensor=2", Mesh(np.array(jax.local_devices()), ("tensor",))):
        try:
            answers(mesh)
        except ValueError as error:
            refused.append(str(error))
    with watched(30) as group:  # processes may part and meet again
        found["said"] = group.share(f"of process {number}")
        found["shares"] = {
            f"{path.name} {mesh}": share_that_is_read(path, mesh)
            for path in sorted(Path(sys.argv[3]).iterdir())
            for mesh in ("tensor=4", "seq=2,tensor=2")
        }
    if number == 0:
        found["alone"] = answers(None)
    print(json.dumps(found))
