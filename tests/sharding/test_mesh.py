"""Meshes by name, and rules from logical axes to them."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxinfer.models.parallel.parallel import model_mesh
from jaxinfer.sharding.mesh import make_mesh, parse_mesh
from jaxinfer.sharding.rules import partition_spec


def test_axes_that_are_not_named_have_size_one():
    assert parse_mesh("tensor=4") == {"data": 1, "seq": 1, "tensor": 4}
    assert list(parse_mesh(" tensor = 2, data=3")) == ["data", "seq", "tensor"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "mesh must be AXIS=SIZE"),
        ("tensor", "mesh must be AXIS=SIZE"),
        ("tensor=2,", "mesh must be AXIS=SIZE"),
        ("model=2", "mesh axis must be among data, seq, tensor; got 'model'"),
        ("tensor=2,tensor=2", "mesh axis tensor is named twice"),
        ("tensor=0", "mesh axis tensor must have a positive size; got '0'"),
        ("tensor=-1", "must have a positive size; got '-1'"),
        ("tensor=two", "must have a positive size; got 'two'"),
        ("tensor=²", "must have a positive size"),
    ],
)
def test_sizes_that_are_none(text, message):
    with pytest.raises(ValueError, match=message):
        parse_mesh(text)


def test_one_device():
    mesh = make_mesh("tensor=1")
    assert dict(mesh.shape) == {"data": 1, "seq": 1, "tensor": 1}
    assert mesh.devices.flat[0] == jax.devices()[0]


def test_too_few_devices_are_counted():
    with pytest.raises(ValueError, match=r"mesh 'tensor=2,data=3' needs 6 devices; there is 1"):
        make_mesh("tensor=2,data=3", jax.devices()[:1])


@pytest.mark.parametrize("mesh", [8, {"tensor": 2}, (2, 4), None])
def test_what_is_no_mesh(unchecked, mesh):
    with pytest.raises(TypeError, match=r'mesh must be a text, .*"tensor=2", or a jax\.sharding'):
        make_mesh(mesh)


def test_a_mesh_of_the_callers_gets_the_axes_that_it_lacks():
    mesh = make_mesh(Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("tensor", "data")))
    assert mesh.axis_names == ("data", "seq", "tensor")
    assert mesh == make_mesh("tensor=1")


def test_a_mesh_with_an_axis_of_another_name():
    with pytest.raises(ValueError, match="mesh axes must be among data, seq, tensor; got 'x'"):
        make_mesh(Mesh(np.array(jax.devices()[:1]), ("x",)))


def test_rules():
    rules = {"vocab": "tensor", "rows": "data", "embed": None}
    assert partition_spec(("rows", "vocab", "embed"), rules) == P("data", "tensor", None)
    assert partition_spec((), rules) == P()


@pytest.mark.parametrize(
    ("axes", "rules", "message"),
    [
        (("vocab", "emb"), {"vocab": "tensor", "embed": None}, "logical axis 'emb'; known: vocab"),
        (("vocab",), {"vocab": "model"}, "rule vocab → model: the mesh has no such axis"),
        (
            ("a", "b"),
            {"a": "tensor", "b": "tensor"},
            "tensor would divide two dimensions .*a and b",
        ),
    ],
)
def test_rules_that_do_not_fit(axes, rules, message):
    with pytest.raises(ValueError, match=message):
        partition_spec(axes, rules)


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh asks one of several processes for."""

    id: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


@pytest.fixture
def devices(monkeypatch) -> list[Device]:
    """Two of each of two processes."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    return [Device(number, number // 2) for number in range(4)]


def test_copies_belong_to_one_process(devices):
    with pytest.raises(ValueError, match="by one process, and there are 2; got data=2"):
        model_mesh(Mesh(np.array(devices[1:3]), ("data",)))


def test_every_process_takes_part(devices):
    with pytest.raises(ValueError, match=r"'tensor=2' has 2 devices, but the processes .* have 4"):
        make_mesh("tensor=2", devices)
    with pytest.raises(ValueError, match="mesh has no device of process 0; every one of the 2"):
        make_mesh(Mesh(np.array(devices[2:]), ("tensor",)))
    assert make_mesh(Mesh(np.array(devices[::2]), ("tensor",))).size == 2


def test_too_few_devices_are_counted_for_each_process(devices):
    with pytest.raises(ValueError, match=r"there are 4; .*device_count=4 in each process divides"):
        make_mesh("tensor=8", devices)
