"""Weights under canonical names into the arrays of a decoder, whole or in shards, and back.

An array of a decoder may hold several weights side by side (Q, K and V; gate and up). A shard of
such an array has its parts of each, `[q_i | k_i | v_i]`, so that every device splits its own in the
same way as a single device does.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxinfer.models.parallel.axes import divided_axis, weight_spec
from jaxinfer.models.parallel.parallel import Parallel
from jaxinfer.models.weights import weight_shapes

# Gives the array that holds the weights of these names side by side.
Weights = Callable[..., jax.Array]


def whole_weights(read: Callable[[str], jax.Array]) -> Weights:
    """Arrays of one device.

    Args:
        read: Gives one weight by canonical name.
    """

    def weights(*names: str) -> jax.Array:
        arrays = [read(name) for name in names]
        return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=-1)

    return weights


def divided_weights(
    read: Callable[[str], np.ndarray | jax.Array], parallel: Parallel, dtype: Any
) -> Weights:
    """Arrays that are divided over a mesh.

    Args:
        read: Gives one weight by canonical name: an array, or what has `shape` and gives arrays
            when it is indexed. Of one that is in a file, only the parts that are needed are read.
        parallel: How to divide.
        dtype: What the weights are converted to.

    Memory: each device gets its own part and nothing else; on the host there are the weights of
    one array, where `read` makes them, and the shards of this process's devices.
    """

    def weights(*names: str) -> jax.Array:
        arrays = [read(name) for name in names]
        sharding = NamedSharding(parallel.mesh, weight_spec(names[0]))
        axis = divided_axis(names[0])
        if axis is None:
            whole = np.asarray(arrays[0]).astype(dtype)
            return jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)
        sources = [source(name, parallel) for name in names]
        width = sum(of.shape[1] for of in sources)
        shape = list(arrays[0].shape)
        shape[axis] = width * parallel.size

        @functools.cache  # devices along other axes have the same, which is read once
        def part(number: int) -> np.ndarray:
            local = list(shape)
            local[axis] = width
            out = np.zeros(local, dtype)
            at = 0
            for array, of in zip(arrays, sources, strict=True):
                _copy(array, of[number], out, at, axis)
                at += of.shape[1]
            return out

        def shard(index: Any) -> np.ndarray:  # one slice per dimension
            return part((index[axis].start or 0) // width)

        return jax.make_array_from_callback(tuple(shape), sharding, shard)

    return weights


def split(
    names: Sequence[str],
    array: jax.Array,
    shapes: dict[str, tuple[int, ...]],
    parallel: Parallel | None,
) -> Iterator[tuple[str, jax.Array | np.ndarray]]:
    """The weights that an array of a decoder holds, by canonical name.

    Args:
        names: Of the weights, in order.
        array: From `whole_weights` or `divided_weights`.
        shapes: Shape of every weight (`models.weights.weight_shapes`).
        parallel: How the array is divided; None: it is whole.

    Yields:
        Name and weight; of a divided array on the host.
    """
    axis = divided_axis(names[0])
    if parallel is None or axis is None:
        cuts = np.cumsum([shapes[name][-1] for name in names])[:-1].tolist()
        parts = jnp.split(array, cuts, axis=-1) if cuts else [array]
        yield from zip(names, parts, strict=True)
        return
    host = np.moveaxis(np.asarray(array), axis, 0)
    shards = host.reshape(parallel.size, -1, *host.shape[1:])
    at = 0
    for name in names:
        of = source(name, parallel)
        part = shards[:, at : at + of.shape[1]]
        at += of.shape[1]
        out = np.empty((shapes[name][axis], *host.shape[1:]), host.dtype)
        # Several devices may hold the same head; their copies are equal.
        out[of[of >= 0]] = part[of >= 0]
        yield name, np.moveaxis(out, 0, axis)


def source(name: str, parallel: Parallel) -> np.ndarray:
    """What of a weight each device holds.

    Args:
        name: Canonical name of a weight that is divided.
        parallel: How.

    Returns:
        `[size, width]` int64: index along the divided axis of the weight; -1: zeros.
    """
    config, heads = parallel.config, parallel.heads
    last = name.rpartition(".")[2]
    if last in ("q_proj", "q_bias", "o_proj"):
        return _elements(heads.queries, config.head_dim)
    if last in ("k_proj", "k_bias", "v_proj", "v_bias"):
        return _elements(heads.kv, config.head_dim)
    axis = divided_axis(name)
    assert axis is not None, f"{name} is not divided"
    length = weight_shapes(config)[name][axis]
    width = -(-length // parallel.size)
    index = np.arange(parallel.size * width).reshape(parallel.size, width)
    return np.where(index < length, index, -1)


def _elements(heads: Sequence[Sequence[int]], head_dim: int) -> np.ndarray:
    """Indices of the numbers of heads."""
    first = np.asarray(heads)[:, :, None] * head_dim
    index = np.where(first >= 0, first + np.arange(head_dim), -1)
    return index.reshape(len(heads), -1)


def _copy(array: Any, source: np.ndarray, out: np.ndarray, at: int, axis: int) -> None:
    """Copy what `source` names into `out` from `at` on; converts to the dtype of `out`.

    Slices, since indexing by an array would copy twice, and from a file read everything.
    """
    if isinstance(array, jax.Array):
        array = np.asarray(array)
    before = (slice(None),) * axis
    ends = np.flatnonzero(np.diff(source) != 1) + 1
    for begin, end in zip([0, *ends], [*ends, len(source)], strict=True):
        first = source[begin]
        if first >= 0:
            here = (*before, slice(at + begin, at + end))
            out[here] = array[*before, first : first + end - begin]
