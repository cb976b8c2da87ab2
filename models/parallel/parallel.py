"""`Parallel`: a decoder's shape divided over a mesh, and functions that run on the parts."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinfer.models.config import DecoderConfig
from jaxinfer.models.parallel.axes import PAGES, RULES, weight_spec
from jaxinfer.models.parallel.heads import HeadDivision, divide_heads
from jaxinfer.sharding.mesh import DATA, SEQ, TENSOR, make_mesh
from jaxinfer.sharding.rules import partition_spec


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How a decoder is divided over a mesh: weights along `tensor`, tokens along `seq`.

    Along `data` there are copies (`replicas`). A call of the decoder itself computes the same on
    each of them.

    Attributes:
        config: The whole model's shape.
        mesh: With the axes `data`, `seq` and `tensor`.
    """

    config: DecoderConfig
    mesh: Mesh

    @classmethod
    def create(cls, config: DecoderConfig, mesh: str | Mesh) -> "Parallel":
        """Divide a model.

        Args:
            config: The model's shape.
            mesh: As in `model_mesh`, with the same errors.
        """
        return cls(config, model_mesh(mesh))

    @property
    def size(self) -> int:
        """Devices along `tensor`."""
        return self.mesh.shape[TENSOR]

    @property
    def seq(self) -> int:
        """Devices along `seq`."""
        return self.mesh.shape[SEQ]

    @property
    def devices(self) -> list[Any]:
        """Those of this process."""
        return list(self.mesh.local_devices)

    def replicas(self) -> list["Parallel"]:
        """The same division on each part of the mesh along `data`."""
        return [
            Parallel(self.config, Mesh(devices[None], self.mesh.axis_names))
            for devices in self.mesh.devices
        ]

    def of(self, array: jax.Array) -> jax.Array:
        """What the devices of this mesh hold of an array of a larger one, where it is copied."""
        mine = set(self.mesh.devices.flat)
        shards = [s.data for s in array.addressable_shards if s.device in mine]
        assert isinstance(array.sharding, NamedSharding)
        sharding = NamedSharding(self.mesh, array.sharding.spec)
        return jax.make_array_from_single_device_arrays(array.shape, sharding, shards)

    @property
    def heads(self) -> HeadDivision:
        """Which heads each device has."""
        return divide_heads(self.config.num_heads, self.config.num_kv_heads, self.size)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding on one device."""
        return -(-self.config.vocab_size // self.size)

    @property
    def local(self) -> DecoderConfig:
        """The shape that one device computes, but for the vocabulary, whose scores are gathered."""
        heads = self.heads
        return dataclasses.replace(
            self.config,
            num_heads=heads.num_heads,
            num_kv_heads=heads.num_kv_heads,
            intermediate_size=-(-self.config.intermediate_size // self.size),
        )

    @property
    def replicated(self) -> NamedSharding:
        """The same on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def pages(self) -> NamedSharding:
        """Of pages `[P, size·K, seq·p, H]`: every device has its KV heads' part of p slots."""
        return NamedSharding(self.mesh, partition_spec(PAGES, RULES))

    def run(
        self,
        function: Callable[..., Any],
        model: Any,
        *args: Any,
        in_specs: tuple[Any, ...],
        out_specs: Any,
    ) -> Any:
        """Call a function on every device with its part of a model and of the arguments.

        Kernels of Pallas cannot be partitioned by XLA, so they see the arrays of one device, and
        what devices tell each other is written out.

        Args:
            function: Takes the model and `args`.
            model: A module whose arrays are divided as `weight_spec` says.
            args: Arrays, or pytrees of them.
            in_specs: How each of them is divided; a prefix of it.
            out_specs: How the results are.
        """
        arrays, structure = jax.tree_util.tree_flatten_with_path(model)
        specs = [weight_spec(_name(path)) for path, _ in arrays]

        def body(leaves: list[jax.Array], *args: Any) -> Any:
            return function(jax.tree.unflatten(structure, leaves), *args)

        # Blocked attention does not say which values of its loop differ between devices.
        mapped = jax.shard_map(
            body, mesh=self.mesh, in_specs=(specs, *in_specs), out_specs=out_specs,
            check_vma=False,
        )  # fmt: skip
        return mapped([leaf for _, leaf in arrays], *args)


def model_mesh(mesh: str | Mesh) -> Mesh:
    """A mesh that a model can be divided over.

    Args:
        mesh: As in `sharding.mesh.make_mesh`.

    Raises:
        ValueError: as in `make_mesh`, or copies of a model in one program of several processes.
    """
    mesh = make_mesh(mesh)
    if (size := mesh.shape[DATA]) > 1 and jax.process_count() > 1:
        raise ValueError(
            f"copies of a model are driven by one process, and there are {jax.process_count()}; "
            f"got {DATA}={size}; run programs that know nothing of each other instead"
        )
    return mesh


def _name(path: tuple[Any, ...]) -> str:
    """The attribute of the module that holds an array."""
    # The last entry is the field of nnx.Param that holds its array.
    names = [getattr(key, "name", getattr(key, "key", None)) for key in path]
    return next(name for name in reversed(names) if isinstance(name, str) and name != "value")
