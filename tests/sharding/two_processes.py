"""One of two processes that answer together; run by `test_two_processes.py`.

Arguments: its number, and the address of the first. Prints a JSON object.
"""

import json
import sys

import jax
import jax.numpy as jnp

from jaxinfer.engine.sizing import least_of_processes
from jaxinfer.llm import LLM
from jaxinfer.models.config import DecoderConfig
from jaxinfer.models.decoder import Decoder
from jaxinfer.sampling_params import SamplingParams

CONFIG = DecoderConfig.tiny(num_heads=9, num_kv_heads=3, tie_embeddings=True)
PROMPTS = [[1, 2, 3], [(5 * i) % 250 for i in range(40)], [7] * 9]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=12),
    SamplingParams(temperature=1.0, seed=3, max_tokens=12, repetition_penalty=1.2, logprobs=2),
    SamplingParams(temperature=0, max_tokens=12, prompt_logprobs=1),
]


def answers(mesh: str | None) -> list[list[int]]:
    model = Decoder(CONFIG, dtype=jnp.float32, mesh=mesh)
    llm = LLM((model, None), max_num_seqs=2, max_num_batched_tokens=32, block_size=16)
    return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, PARAMS)]


if __name__ == "__main__":
    number, address = int(sys.argv[1]), sys.argv[2]
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(coordinator_address=address, num_processes=2, process_id=number)
    found: dict[str, object] = {"devices": jax.device_count(), "answers": answers("tensor=4")}
    found["least"] = least_of_processes(7 + number)
    try:
        answers("tensor=2")
    except ValueError as error:
        found["error"] = str(error)
    if number == 0:
        found["alone"] = answers(None)
    print(json.dumps(found))
