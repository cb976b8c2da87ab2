"""What measuring needs to know of an op."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax

from jaxinfer.models.config import DecoderConfig
from jaxinfer.pallas_kernels.device import DeviceSpec


@runtime_checkable
class Spec(Protocol):
    """A call of an op, by its sizes."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def tuning_key(self) -> str:
        """Name of the call in tuning data."""
        ...


class Op[S: Spec, C](abc.ABC):
    """An op whose implementations `"xla"` and `"mosaic"` compete, the latter with several tilings.

    Attributes:
        name: As the dispatcher knows it, which is also the name of its tuning data.
        unit: What its calls in a model are, in the plural.
        seconds: About how long it takes to compile and to time one implementation or tiling.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    seconds: ClassVar[float]

    @abc.abstractmethod
    def specs(self, config: DecoderConfig, *, model: str, dtype: str) -> list[S]:
        """The calls of a model, at all sizes that are measured.

        Args:
            config: The model's shape.
            model: Its name, for messages.
            dtype: Of all arrays.
        """

    def too_large(self, spec: S) -> str:
        """Why a call is not measured, in words; empty if it is."""
        del spec
        return ""

    def least_gain_us(self, spec: S) -> float:
        """What the kernel must save to be chosen, beside what noise is, µs."""
        del spec
        return 0.0

    @abc.abstractmethod
    def candidates(self, device: DeviceSpec, spec: S) -> list[C]:
        """Tilings of the kernel that compete; empty if it cannot serve the call."""

    @abc.abstractmethod
    def heuristic(self, device: DeviceSpec, spec: S) -> C | None:
        """The tiling, one of the candidates, that an unmeasured call gets; None: XLA serves it."""

    @abc.abstractmethod
    def make_inputs(self, spec: S, key: jax.Array) -> tuple[jax.Array | None, ...]:
        """Random arrays, in the order of the call."""

    @abc.abstractmethod
    def call(self, spec: S, **options: Any) -> Callable[..., jax.Array]:
        """The op as a function of its arrays, with `implementation` and `config` as given."""

    @abc.abstractmethod
    def reference(self, spec: S) -> Callable[..., Any]:
        """What it computes, by XLA in float32, of the same arrays."""

    @abc.abstractmethod
    def sizes(self, spec: S) -> dict[str, Any]:
        """What tells a call from the others of a model, as JSON values."""
