"""The mesh of devices that a model runs on: its axes, and how a user names their sizes."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

DATA, SEQ, TENSOR = "data", "seq", "tensor"
AXES = (DATA, SEQ, TENSOR)
_FORM = 'AXIS=SIZE, several with commas, as in "tensor=2"'


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes of all axes; those that are not named have size 1.

    Args:
        text: For example `"tensor=2"` or `"data=1,seq=1,tensor=2"`.

    Raises:
        ValueError: an axis that does not exist or is named twice, or a size that is not a
            positive whole number.

    >>> parse_mesh("tensor=2")
    {'data': 1, 'seq': 1, 'tensor': 2}
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise ValueError(f"mesh must be {_FORM}; got {text!r}")
        if name not in AXES:
            raise ValueError(f"mesh axis must be among {', '.join(AXES)}; got {name!r}")
        if name in sizes:
            raise ValueError(f"mesh axis {name} is named twice in {text!r}")
        if not (size.isascii() and size.isdigit() and int(size)):
            raise ValueError(f"mesh axis {name} must have a positive size; got {size!r}")
        sizes[name] = int(size)
    return {name: sizes.get(name, 1) for name in AXES}


def what_there_is(needed: int, devices: Sequence[Any]) -> str:
    """For an error where devices are too few: how many there are, and how a CPU makes more.

    Args:
        needed: Devices, of all processes together.
        devices: Those that there are.

    Example: `"there are 4; XLA_FLAGS=--xla_force_host_platform_device_count=8 divides a CPU"`.
    """
    hint, processes = "", jax.process_count()
    if devices[0].platform == "cpu" and needed % processes == 0:
        each = f"={needed // processes}{' in each process' if processes > 1 else ''}"
        hint = f"; XLA_FLAGS=--xla_force_host_platform_device_count{each} divides a CPU"
    return f"there {'is' if len(devices) == 1 else 'are'} {len(devices)}{hint}"


def make_mesh(mesh: str | Mesh, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes `data`, `seq` and `tensor`.

    Neighbours along `tensor`, which talk most, are neighbours in the list of devices, and so of one
    host where its size allows.

    Args:
        mesh: Sizes as `parse_mesh` takes them, or a mesh with some of these axes, in any order.
        devices: For sizes only: what to choose from; default all of JAX. The first ones are taken.

    Returns:
        The mesh. All axes are of type Auto: the axes of `jax.make_mesh` are Explicit, which would
        make every operation of a caller's program decide about sharding.

    Raises:
        TypeError: neither sizes as a text nor a mesh.
        ValueError: as in `parse_mesh`; an unknown axis of a mesh; more devices than there are, or,
            in one program of several processes, fewer, or a mesh without a device of every process.
    """
    if isinstance(mesh, Mesh):
        return _with_all_axes(mesh)
    if not isinstance(mesh, str):
        raise TypeError(
            f"mesh must be a text, {_FORM}, or a jax.sharding.Mesh; got {type(mesh).__name__}"
        )
    sizes = parse_mesh(mesh)
    devices = jax.devices() if devices is None else devices
    needed = math.prod(sizes.values())
    if needed > len(devices):
        raise ValueError(f"mesh {mesh!r} needs {needed} devices; {what_there_is(needed, devices)}")
    if needed < len(devices) and jax.process_count() > 1:
        raise ValueError(
            f"mesh {mesh!r} has {needed} devices, but the processes of this program have "
            f"{len(devices)}; every one of them must take part"
        )
    grid = np.asarray(devices[:needed], dtype=object).reshape(tuple(sizes.values()))
    return Mesh(grid, AXES)


def _with_all_axes(mesh: Mesh) -> Mesh:
    if unknown := [name for name in mesh.axis_names if name not in AXES]:
        raise ValueError(f"mesh axes must be among {', '.join(AXES)}; got {unknown[0]!r}")
    order = [mesh.axis_names.index(name) for name in AXES if name in mesh.axis_names]
    shape = tuple(mesh.shape.get(name, 1) for name in AXES)
    taking_part = {device.process_index for device in mesh.devices.flat}
    if missing := sorted(set(range(jax.process_count())) - taking_part):
        raise ValueError(
            f"mesh has no device of process {missing[0]}; every one of the {jax.process_count()} "
            "processes of this program must take part"
        )
    return Mesh(mesh.devices.transpose(order).reshape(shape), AXES)
