"""From what the axes of an array mean to the axes of the mesh that divide them."""

from collections.abc import Mapping, Sequence

from jax.sharding import PartitionSpec

from jaxinfer.sharding.mesh import AXES

Rules = Mapping[str, str | None]


def partition_spec(
    axes: Sequence[str], rules: Rules, mesh_axes: Sequence[str] = AXES
) -> PartitionSpec:
    """How an array is divided.

    Args:
        axes: Logical name of each dimension.
        rules: Mesh axis that divides each logical axis; None: every device has all of it.
        mesh_axes: The axes that exist.

    Raises:
        ValueError: a logical axis without a rule, a rule for a mesh axis that does not exist, or
            two dimensions on one mesh axis.

    >>> tuple(partition_spec(("vocab", "embed"), {"vocab": "tensor", "embed": None}))
    ('tensor', None)
    """
    taken: dict[str, str] = {}
    for axis in axes:
        if axis not in rules:
            raise ValueError(f"no rule for logical axis {axis!r}; known: {', '.join(rules)}")
        target = rules[axis]
        if target is None:
            continue
        if target not in mesh_axes:
            raise ValueError(
                f"rule {axis} → {target}: the mesh has no such axis; it has {', '.join(mesh_axes)}"
            )
        if target in taken:
            raise ValueError(
                f"mesh axis {target} would divide two dimensions of one array: "
                f"{taken[target]} and {axis}"
            )
        taken[target] = axis
    return PartitionSpec(*(rules[axis] for axis in axes))
