"""Dense causal prefill attention."""

import functools

import jax

from bench.case import Implementation, OpCase
from jaxinfer.pallas_kernels.attention import specs
from jaxinfer.pallas_kernels.attention.api import attention
from jaxinfer.pallas_kernels.attention.specs import SPECS, AttentionSpec
from jaxinfer.pallas_kernels.dispatch import NotSupported

_LONGEST_DENSE = 16384  # beyond it the scores of jax.nn's XLA path exceed the memory


def cases() -> list[OpCase]:
    """Every spec with all implementations of the op, and stock JAX."""
    return [_case(spec) for spec in SPECS]


def _case(spec: AttentionSpec) -> OpCase:
    names = ("flash_attn3", "cudnn", "tokamax", "xla")
    calls = {name: _ours(spec, name) for name in names}
    return OpCase.of(
        "attention",
        specs,
        spec,
        reference=functools.partial(_reference, spec),
        table={
            "dispatch": _ours(spec, None),
            **calls,
            "jax_nn": Implementation(call=functools.partial(_jax_nn, spec)),
        },
    )


def _ours(spec: AttentionSpec, name: str | None) -> Implementation:
    return Implementation(call=functools.partial(attention, **spec.options, implementation=name))


def _reference(spec: AttentionSpec, query, key, value):
    arrays = (x.astype("float32") for x in (query, key, value))
    return attention(*arrays, **spec.options, implementation="xla")


def _jax_nn(spec: AttentionSpec, query, key, value):
    """What JAX does by default."""
    options = spec.options
    if options.pop("q_offset") is not None or options.pop("logits_softcap") is not None:
        raise NotSupported("attention", "jax_nn", "q_offset or logits_softcap", "None")
    if spec.T > _LONGEST_DENSE:
        raise NotSupported("attention", "jax_nn", f"T = {spec.T}", f"at most {_LONGEST_DENSE}")
    return jax.nn.dot_product_attention(query, key, value, implementation="xla", **options)
