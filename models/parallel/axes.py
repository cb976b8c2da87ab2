"""What the axes of a decoder's arrays mean, and which axis of the mesh divides them."""

from jax.sharding import PartitionSpec

from jaxinfer.sharding.mesh import SEQ, TENSOR
from jaxinfer.sharding.rules import Rules, partition_spec

# As in Megatron-LM: the first product of a block is divided by its columns, the second by its rows,
# so that a device needs nothing of the others in between and a sum follows. Of the slots of a page,
# every device along `seq` has as many.
RULES: Rules = {
    "vocab": TENSOR, "heads": TENSOR, "mlp": TENSOR, "embed": None, "norm": None,
    "page": None, "slot": SEQ, "head_dim": None,
}  # fmt: skip

PAGES = ("page", "heads", "slot", "head_dim")

_WEIGHTS: dict[str, tuple[str, ...]] = {
    "embed": ("vocab", "embed"),
    "lm_head": ("embed", "vocab"),
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), ("embed", "heads")),
    **dict.fromkeys(("q_bias", "k_bias", "v_bias"), ("heads",)),
    "o_proj": ("heads", "embed"),
    **dict.fromkeys(("gate_proj", "up_proj"), ("embed", "mlp")),
    "down_proj": ("mlp", "embed"),
    **dict.fromkeys(("q_norm", "k_norm", "attn_norm", "mlp_norm"), ("norm",)),
    **dict.fromkeys(("post_attn_norm", "post_mlp_norm", "final_norm"), ("norm",)),
}
# Arrays of the module that hold several weights, and the norms' `weight`.
_MODULE: dict[str, tuple[str, ...]] = {
    "qkv_proj": _WEIGHTS["q_proj"],
    "qkv_bias": _WEIGHTS["q_bias"],
    "gate_up_proj": _WEIGHTS["gate_proj"],
    "weight": ("norm",),
}


def logical_axes(name: str) -> tuple[str, ...]:
    """Axes of a weight by its canonical name, or of an array by its name in the module.

    Raises:
        ValueError: a name that no decoder has.

    >>> logical_axes("layers.0.q_proj"), logical_axes("qkv_proj")
    (('embed', 'heads'), ('embed', 'heads'))
    """
    last = name.rpartition(".")[2]
    axes = _WEIGHTS.get(last) or _MODULE.get(last)
    if axes is None:
        raise ValueError(f"no logical axes are known for weight {name!r}")
    return axes


def weight_spec(name: str) -> PartitionSpec:
    """How a weight is divided; names and errors as in `logical_axes`."""
    return partition_spec(logical_axes(name), RULES)


def divided_axis(name: str) -> int | None:
    """The dimension of a weight that the tensor axis divides, or None."""
    spec = tuple(weight_spec(name))
    return spec.index(TENSOR) if TENSOR in spec else None
