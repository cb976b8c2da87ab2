"""Sizes of an engine that fit the model and the device."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.engine.config import EngineConfig, check_sizes
from jaxinfer.engine.room import free_memory
from jaxinfer.errors import KVCacheFullError
from jaxinfer.models.config import DecoderConfig
from jaxinfer.models.decoder import Decoder
from jaxinfer.pallas_kernels.decode_attention.api import decode_attention
from jaxinfer.pallas_kernels.decode_attention.config import BATCHES
from jaxinfer.pallas_kernels.device import current_device
from jaxinfer.pallas_kernels.dispatch import Verdict, explain, force_all, parse_forced

_CPU_CACHE_BYTES = 1 << 30
_LONGEST_BY_DEFAULT = 32_768


def context_length(max_model_len: int | None, config: DecoderConfig) -> int:
    """Longest prompt plus answer, tokens: what was asked for, else the model's, up to a bound.

    Raises:
        ValueError: more than the model has was asked for.
    """
    longest = config.max_position_embeddings
    if max_model_len is not None and max_model_len > longest:
        raise ValueError(
            f"max_model_len must be at most {longest}, the longest context this model was "
            f"trained for; got {max_model_len}"
        )
    return max_model_len or min(longest, _LONGEST_BY_DEFAULT)


def choose_sizes(
    model: Decoder,
    *,
    max_model_len: int | None,
    max_num_seqs: int | None,
    max_num_batched_tokens: int | None,
    block_size: int,
    gpu_memory_utilization: float,
    num_gpu_blocks_override: int | None,
    steps_per_sync: int | None,
    seed: int,
    implementation: str | None,
    batch_invariant: bool,
) -> EngineConfig:
    """Fill in what the caller left open; arguments as in `jaxinfer.LLM`.

    Raises:
        ValueError: a size that is not positive, a context longer than the model's, or a
            share of memory outside of (0, 1].
        KVCacheFullError: nothing is left for the cache beside the weights.
    """
    check_sizes(
        max_model_len=max_model_len, max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens, block_size=block_size,
        gpu_memory_utilization=gpu_memory_utilization,
        num_gpu_blocks_override=num_gpu_blocks_override, steps_per_sync=steps_per_sync, seed=seed,
    )  # fmt: skip
    config = model.config
    on_cpu = jax.default_backend() == "cpu"
    length = context_length(max_model_len, config)
    rows = max_num_seqs or (8 if on_cpu else 64)
    shares = 1 if model.parallel is None else model.parallel.seq
    # A device computes one share of a call's tokens, so that it takes as many to fill it.
    tokens = max_num_batched_tokens or shares * default_batched_tokens()
    page_size = shares * block_size
    dtype = model.embed[...].dtype
    pages = num_gpu_blocks_override
    if pages is None:
        wanted = rows * -(-length // page_size)
        if on_cpu:
            budget = min(_CPU_CACHE_BYTES, free_memory() // 2) // len(model.devices)
        else:
            scratch = _scratch_bytes(
                model.part, rows=rows, tokens=tokens, length=length, shares=shares
            )
            budget = _free_bytes(gpu_memory_utilization, model.devices) - scratch
        pages = min(wanted, budget // _page_bytes(model.part, block_size, dtype))
        if model.parallel is not None:
            pages = least_of_processes(pages)
        if pages < 1:
            advice = "" if on_cpu else "raise gpu_memory_utilization or "
            raise KVCacheFullError(
                f"no memory is left for the KV cache ({budget / 1e9:.1f} GB); "
                f"{advice}choose a smaller model"
            )
    if max_model_len is None:
        length = min(length, pages * page_size)
    with force_all(parse_forced(implementation)):
        full_tables = not batch_invariant and reads_only_lengths(
            model.part, block_size, dtype, rows=rows, width=-(-length // page_size)
        )
    steps = steps_per_sync or (2 if on_cpu else 8)
    return EngineConfig(
        max_model_len=length,
        num_pages=pages,
        page_size=page_size,
        max_num_seqs=rows,
        max_num_batched_tokens=tokens,
        steps_per_sync=steps,
        # Where the host computes, dispatching less saves nothing; with collectives it is untried.
        steps_per_program=1 if on_cpu or model.parallel is not None else steps,
        dtype=dtype,
        seed=seed,
        implementation=implementation,
        batch_invariant=batch_invariant,
        full_tables=full_tables,
    )


def default_batched_tokens() -> int:
    """Most tokens of one prefill call: enough to fill the device, few enough to wait for."""
    return 512 if jax.default_backend() == "cpu" else 8192


def reads_only_lengths(
    config: DecoderConfig, page_size: int, dtype: Any, *, rows: int = 1, width: int = 1
) -> bool:
    """Whether the attention that decode steps get leaves pages alone that no length reaches.

    The Mosaic kernel does; `xla` copies all pages that a table names.

    Args:
        config: The shape that a device computes.
        page_size: p, of one device.
        dtype: Of the cache.
        rows: Most requests of a step: of fewer, all that may get another implementation are asked.
        width: Pages of a row in whole tables.
    """
    if not current_device().is_hopper:
        return False  # what the kernel needs first, and quickly said
    windows = {config.window(layer) for layer in range(config.num_layers)}
    for B in {min(rows, size) for size in BATCHES} | {rows}:
        for window in windows:
            verdicts = decode_verdicts(
                config, page_size, dtype, rows=B, width=width,
                local_window_size=None if window is None else (window - 1, 0),
            )  # fmt: skip
            taken = next(verdict for verdict in verdicts if verdict.serves)
            if taken.implementation != "mosaic":
                return False
    return True


def decode_verdicts(
    config: DecoderConfig, page_size: int, dtype: Any, *, rows: int, width: int, **options: Any
) -> list[Verdict]:
    """What `explain` finds for the attention of a decode step.

    Args:
        config: The shape that a device computes.
        page_size: p, of one device.
        dtype: Of the cache.
        rows: Requests of the step.
        width: Pages of a row.
        **options: Of `decode_attention`.
    """
    K, H = config.num_kv_heads, config.head_dim
    shapes = ((rows, 1, config.num_heads, H), *2 * ((1, K, page_size, H),))
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    tables = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, width), (rows,))]
    with explain() as verdicts:
        # A new function: JAX does not trace a known one again.
        jax.eval_shape(functools.partial(decode_attention, **options), *arrays, *tables)
    return verdicts


def _page_bytes(config: DecoderConfig, page_size: int, dtype: Any) -> int:
    """Memory of one page over all layers, keys and values, bytes."""
    tokens = config.num_layers * page_size * config.num_kv_heads * config.head_dim
    return 2 * tokens * jnp.dtype(dtype).itemsize


def _scratch_bytes(
    config: DecoderConfig, *, rows: int, tokens: int, length: int, shares: int = 1
) -> int:
    """Memory that the largest calls need beside weights and cache, generously.

    Args:
        config: The shape that a device computes.
        rows: Most of a decode step.
        tokens: Most of a prefill call.
        length: Longest sequence.
        shares: Devices that share the tokens of a sequence.
    """
    gathered = 0
    if shares > 1:
        # Queries of all and outputs for all, twice; and in the end everybody's hidden states.
        heads = config.num_heads * config.head_dim
        gathered = tokens * (16 * heads + 8 * config.hidden_size)
        tokens, length = -(-tokens // shares), -(-length // shares)
    activations = 4 * tokens * (2 * config.intermediate_size + 8 * config.hidden_size)
    scores = 16 * rows * config.vocab_size
    # A later chunk of a prompt attends to a copy of its pages, under a mask.
    copied = 8 * length * config.num_kv_heads * config.head_dim
    return activations + scores + copied + gathered + 2 * tokens * length


def least_of_processes(number: int) -> int:
    """The least that any process proposes: all run the same programs on the same shapes."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(jnp.int32(number)).min())


def _free_bytes(utilization: float, devices: Sequence[Any]) -> int:
    """Memory that is left once weights are loaded, on the device with the least."""
    left = []
    for device in devices:
        stats = device.memory_stats()
        if not stats or "bytes_limit" not in stats:
            raise KVCacheFullError(
                "this device does not tell how much memory it has; set num_gpu_blocks_override"
            )
        left.append(int(stats["bytes_limit"] * utilization) - stats["bytes_in_use"])
    return min(left)
