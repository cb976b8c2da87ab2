"""What a benchmark measures: a case of an op, and the implementations that compete on it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from bench.timing import Compiled

Arrays = tuple[Any, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One implementation on one case.

    Attributes:
        median_us: Time of a call, µs.
        iqr_us: Interquartile range of the calls, µs.
        rel_rms: Relative RMS error against the reference.
        compile_s: Tracing, lowering and compiling, s.
        implementation: What really ran, where a chooser decided; empty: the one asked for.
        extra: Further values for the row, such as tokens per second.
        details: A line to print below that of the row; empty: none.
    """

    median_us: float
    iqr_us: float
    rel_rms: float
    compile_s: float
    implementation: str = ""
    extra: Mapping[str, float] = dataclasses.field(default_factory=dict)
    details: str = ""

    @classmethod
    def of(cls, times: Sequence[float], **fields: Any) -> "Measurement":
        """Median and interquartile range of `times` (µs), and the other fields."""
        low, median, high = (float(q) for q in np.percentile(times, (25, 50, 75)))
        return cls(median_us=median, iqr_us=high - low, **fields)


class WrongResult(AssertionError):
    """An implementation's result is too far from the reference; it gets no time."""


class Case(Protocol):
    """A case that can be measured.

    Attributes:
        name: Lower-case words, the model shape first.
        tag: `"primary"` (reported), `"stress"` or `"ci"`.
        implementations: Their names, in the order of the report.
        flops: Operations that a call must do.
        bytes: Fewest bytes that a call must move.
    """

    name: str
    tag: str
    flops: float
    bytes: float

    @property
    def implementations(self) -> tuple[str, ...]:
        """Names of what can be measured."""
        ...

    def measure(self, implementation: str, *, repeats: int) -> Measurement:
        """Check and time one implementation.

        Raises:
            NotSupported: it cannot serve the case, or its package is not installed.
            WrongResult: it computes something else.
        """
        ...


def _same(*arrays: Any) -> Arrays:
    return arrays


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Implementation:
    """A way to compute an op.

    Attributes:
        call: The function that is timed; takes what `prepare` gives.
        prepare: From the case's arrays to what `call` takes (another cache layout); not timed.
        donate: Arguments of `call` that it may overwrite.
        renew: From the arguments and the result of a call to the arguments of the next one, where
            some were donated.
        result: From what `call` returns to what the reference returns.
    """

    call: Callable[..., Any]
    prepare: Callable[..., Arrays] = _same
    donate: tuple[int, ...] = ()
    renew: Callable[[Arrays, Any], Arrays] = lambda arrays, _: arrays
    result: Callable[[Any], Any] = lambda result: result


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpCase:
    """A case of one op, timed on the device.

    Attributes:
        op: Name of the op, as the dispatcher knows it.
        name: As in `Case`.
        tag: As in `Case`.
        flops: As in `Case`.
        bytes: As in `Case`.
        dtype: Decides the tolerance.
        make_inputs: From a random key to the op's arrays.
        reference: The right result of these arrays, float32.
        table: The implementations by name.
        compiled: By name, once prepared: each with the choice of the dispatcher, or why not.
    """

    op: str
    name: str
    tag: str
    flops: float
    bytes: float
    dtype: str
    make_inputs: Callable[[jax.Array], Arrays]
    reference: Callable[..., Any]
    table: Mapping[str, Implementation]
    compiled: "dict[str, Compiled | Exception]" = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls,
        op: str,
        specs: ModuleType,
        spec: Any,
        *,
        reference: Callable[..., Any],
        table: Mapping[str, Implementation],
    ) -> "OpCase":
        """The case of a spec.

        Args:
            op: As the attribute.
            specs: The op's `specs.py`: how to make inputs, and to count bytes and operations.
            spec: One of its `SPECS`.
            reference: As the attribute.
            table: As the attribute.
        """
        return cls(
            op=op,
            name=spec.name,
            tag=spec.tag,
            flops=specs.count_flops(spec),
            bytes=specs.count_bytes(spec),
            dtype=getattr(spec, "out_dtype", spec.dtype),
            make_inputs=functools.partial(specs.make_inputs, spec),
            reference=reference,
            table=table,
        )

    @property
    def implementations(self) -> tuple[str, ...]:
        """Names of what can be measured."""
        return tuple(self.table)

    def prepare(self, implementations: Sequence[str]) -> None:
        """Compile several that are measured next: at once it takes a fraction of the time."""
        from bench.timing import compile_all
        from jaxinfer.pallas_kernels.dispatch import choices

        arrays = jax.eval_shape(self.make_inputs, jax.random.key(0))
        self.compiled.update(
            compile_all(
                {name: self.table[name] for name in implementations},
                lambda chosen: jax.eval_shape(chosen.prepare, *arrays),
                lambda: choices()[self.op].implementation if self.op in choices() else "",
            )
        )

    def finish(self) -> None:
        """Free the arrays that implementations shared."""
        _data.forget()

    def measure(self, implementation: str, *, repeats: int) -> Measurement:
        """Check one implementation against the reference, then time it; see `Case.measure`."""
        from bench.gate import check
        from bench.timing import time_calls

        if implementation not in self.compiled:
            self.prepare([implementation])
        compiled = self.compiled.pop(implementation)
        if isinstance(compiled, Exception):
            raise compiled
        chosen = self.table[implementation]
        arrays, want = _data.of(self)
        if chosen.donate:  # the next implementation wants them too
            arrays = jax.tree.map(jnp.copy, arrays)
        inputs = jax.block_until_ready(chosen.prepare(*arrays))
        timing = time_calls(chosen, compiled, inputs, repeats=repeats)
        error = check(timing.result, want, jnp.dtype(self.dtype).name)
        ran = compiled.note if implementation == "dispatch" else ""
        return Measurement.of(
            timing.times_us, rel_rms=error, compile_s=timing.compile_s, implementation=ran
        )


class _Data:
    """Arrays and right results of one case: its implementations are measured one after another."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Free them."""
        self._case: OpCase | None = None
        self._arrays: Any = None

    def of(self, case: OpCase) -> tuple[Arrays, Any]:
        """Those of a case; another case's are forgotten."""
        if self._case is not case:
            self.forget()
            arrays = jax.block_until_ready(case.make_inputs(jax.random.key(0)))
            with jax.default_matmul_precision("highest"):
                want = jax.block_until_ready(jax.jit(case.reference)(*arrays))
            self._case, self._arrays = case, (arrays, want)
        return self._arrays


_data = _Data()
