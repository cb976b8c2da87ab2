"""Dataclasses as pytrees whose checks run at construction and never at unflatten."""

import dataclasses

import jax


def pytree[C](cls: type[C]) -> type[C]:
    """Register a frozen dataclass as a pytree; every field is a child.

    Unflattening goes around `__init__`, so that transformations may put anything into the fields:
    `jax.tree.map(lambda _: PartitionSpec(), cache)` works although the constructor would refuse
    (Equinox's idea).
    """
    names = tuple(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]
    keys = tuple(jax.tree_util.GetAttrKey(name) for name in names)

    def flatten(node: C):
        return tuple(getattr(node, name) for name in names), None

    def flatten_with_keys(node: C):
        return tuple(zip(keys, flatten(node)[0], strict=True)), None

    def unflatten(_, children) -> C:
        node = object.__new__(cls)
        for name, child in zip(names, children, strict=True):
            object.__setattr__(node, name, child)
        return node

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
