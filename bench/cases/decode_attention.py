"""Decode attention over pages, against peers that mostly have no pages."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.case import Implementation, OpCase
from bench.cases.peers import contiguous, flash_attn3_decode, jax_nn_decode, token_major
from jaxinfer.pallas_kernels.attention.api import attention
from jaxinfer.pallas_kernels.decode_attention import specs
from jaxinfer.pallas_kernels.decode_attention.api import decode_attention
from jaxinfer.pallas_kernels.decode_attention.specs import SPECS, DecodeSpec


def cases() -> list[OpCase]:
    """Every spec with our implementations and the peers."""
    return [_case(spec) for spec in SPECS]


def _case(spec: DecodeSpec) -> OpCase:
    def ours(name: str | None, **options: Any) -> Implementation:
        return Implementation(
            call=functools.partial(decode_attention, **spec.options, **options, implementation=name)
        )

    def in_one_piece(query, key, value, lengths):
        options: dict[str, Any] = {**spec.options, "implementation": "mosaic"}
        return decode_attention(query, key, value, None, lengths, **options)

    def with_counters(*arrays):
        """As the layers of a step call it, which share counters."""
        counters = jax.new_ref(arrays[-1])
        options: dict[str, Any] = {**spec.options, "implementation": "mosaic"}
        return decode_attention(*arrays[:-1], counters=counters, **options), jax.freeze(counters)

    def flash(splits: int, *, paged: bool = False) -> Implementation:
        return Implementation(
            call=flash_attn3_decode(spec, splits=splits, paged=paged),
            prepare=token_major if paged else contiguous,
        )

    return OpCase.of(
        "decode_attention",
        specs,
        spec,
        reference=functools.partial(_reference, spec),
        table={
            "dispatch": ours(None),
            "mosaic": ours("mosaic"),
            "mosaic-counters": Implementation(
                call=with_counters,
                prepare=lambda *arrays: (*arrays, jnp.zeros((spec.B * spec.K,), jnp.int32)),
                donate=(5,),
                renew=lambda arrays, result: (*arrays[:-1], result[1]),
                result=lambda result: result[0],
            ),
            "mosaic-unified": ours("mosaic", softmax="unified"),
            "mosaic-unified-phi": ours("mosaic", softmax="unified", phi=np.zeros(spec.N, "f4")),
            "mosaic-contiguous": Implementation(call=in_one_piece, prepare=contiguous),
            "xla": ours("xla"),
            "jax_nn": Implementation(call=jax_nn_decode(spec, "xla"), prepare=contiguous),
            "cudnn": Implementation(call=jax_nn_decode(spec, "cudnn"), prepare=contiguous),
            "flash_attn3-splits8": flash(8),
            "flash_attn3-splits32": flash(32),
            "flash_attn3-paged-splits8": flash(8, paged=True),
        },
    )


def _reference(spec: DecodeSpec, query, k_pages, v_pages, page_table, lengths):
    """Float32, block by block: the op's own oracle would need terabytes at these sizes."""
    arrays = (x.astype("float32") for x in (query, k_pages, v_pages))
    window = spec.local_window_size
    return attention(
        *arrays, page_table=page_table, is_causal=True, q_offset=lengths - spec.T,
        key_value_seq_lengths=lengths, logits_softcap=spec.logits_softcap,
        local_window_size=None if window is None else (window, 0), implementation="xla",
    )  # fmt: skip
