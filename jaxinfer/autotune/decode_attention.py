"""How the decode attention of a model is measured."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.autotune.op import Op
from jaxinfer.models.config import DecoderConfig
from jaxinfer.pallas_kernels.decode_attention import config as configs
from jaxinfer.pallas_kernels.decode_attention.api import decode_attention
from jaxinfer.pallas_kernels.decode_attention.shape import Config
from jaxinfer.pallas_kernels.decode_attention.specs import DecodeSpec, make_inputs
from jaxinfer.pallas_kernels.decode_attention.xla import decode_attention_xla
from jaxinfer.pallas_kernels.device import DeviceSpec

# Bytes of keys and values of a call that is measured. XLA gathers a copy of them.
MOST_BYTES = 8 << 30


class DecodeAttention(Op[DecodeSpec, Config]):
    """`decode_attention`: full pages, read from memory: the L2 cache is flushed between calls."""

    name, unit = "decode_attention", "calls"
    # To compile one took 2 to 3.5 s on machines with an H100 and an H200 (`compile_s` in
    # bench/results).
    seconds = 3.0

    def specs(self, config: DecoderConfig, *, model: str, dtype: str) -> list[DecodeSpec]:
        """One token for each request, at full lengths, of every kind of layer that the model has.

        With pages of 64 tokens, which `LLM` makes unless told otherwise.
        """
        windows = dict.fromkeys(config.window(layer) for layer in range(config.num_layers))
        specs = [
            DecodeSpec(
                model=model, B=B, S=S, N=config.num_heads, K=config.num_kv_heads,
                H=config.head_dim, dtype=dtype, logits_softcap=config.attention_softcap,
                # A layer's window counts the query's own key; one that hides nothing is none.
                local_window_size=None if window is None or window >= S else window - 1,
            )
            for window in windows for S in configs.CAPACITIES for B in configs.BATCHES
        ]  # fmt: skip
        return list(dict.fromkeys(specs))

    def too_large(self, spec: DecodeSpec) -> str:
        """Whether keys and values take more than `MOST_BYTES`."""
        taken = 2 * spec.B * spec.S * spec.K * spec.H * jnp.dtype(spec.dtype).itemsize
        return f"{taken / 2**30:.0f} GiB of keys and values" if taken > MOST_BYTES else ""

    def candidates(self, device: DeviceSpec, spec: DecodeSpec) -> list[Config]:
        """See `config.candidates`."""
        return configs.candidates(device, N=spec.N, K=spec.K, H=spec.H, page_size=spec.page_size)

    def heuristic(self, device: DeviceSpec, spec: DecodeSpec) -> Config | None:
        """The kernel wherever it can serve."""
        return self.candidates(device, spec)[0]

    def make_inputs(self, spec: DecodeSpec, key: jax.Array) -> tuple[jax.Array, ...]:
        """Query, pages, a shuffled page table and lengths."""
        return make_inputs(spec, key)

    def call(self, spec: DecodeSpec, **options: Any) -> Callable[..., jax.Array]:
        """The attention, with the online softmax."""
        return functools.partial(decode_attention, **spec.options, **options)

    def reference(self, spec: DecodeSpec) -> Callable[..., Any]:
        """The `xla` implementation in float32, one request at a time, whose pages fit so."""
        attend = functools.partial(
            decode_attention_xla, scale=spec.H**-0.5, left_window=spec.local_window_size,
            logits_softcap=spec.logits_softcap,
        )  # fmt: skip

        def reference(query, k_pages, v_pages, page_table, lengths):
            def row(one):
                query, table, length = one
                keys, values = (x[table].astype(jnp.float32) for x in (k_pages, v_pages))
                in_order = jnp.arange(table.size, dtype=jnp.int32)[None]
                query = query[None].astype(jnp.float32)
                return attend(query, keys, values, in_order, length[None])[0][0]

            with jax.default_matmul_precision("highest"):
                return lax.map(row, (query, page_table, lengths))

        return reference

    def sizes(self, spec: DecodeSpec) -> dict[str, Any]:
        """Requests, capacity, heads, pages and window."""
        names = ("B", "S", "N", "K", "H", "page_size", "local_window_size")
        return {name: getattr(spec, name) for name in names}
