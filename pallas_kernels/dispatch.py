"""How an op picks one of its implementations, and says so.

An op's `api.py` builds `{name: callable}` in order of preference and calls `choose`. An
implementation that cannot serve a call raises `NotSupported` before it computes anything.

What is forced, asked and chosen is kept per process, without locks: trace in one thread at a time.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

logger = logging.getLogger("jaxinfer")

Implementation = str | Sequence[str] | None

# Who calls `choose`, with all that it has: names that can be forced. A test compares them.
OPS: dict[str, tuple[str, ...]] = {
    "add_rms_norm": ("mosaic", "xla"),
    "attention": ("flash_attn3", "cudnn", "tokamax", "xla"),
    "decode_attention": ("mosaic", "xla"),
    "matmul": ("mosaic", "xla"),
    "project_rope_write": ("mosaic", "separate", "xla"),
    "rope_kv_write": ("mosaic", "xla"),
}


class NotSupported(NotImplementedError):
    """An implementation cannot serve a call.

    Attributes:
        op: Name of the op, e.g. `"attention"`.
        implementation: Name of the implementation, e.g. `"cudnn"`.
        argument: The argument that it cannot serve, with the value that came.
        nearest: What it could serve instead, in words; empty if nothing.
    """

    def __init__(self, op: str, implementation: str, argument: str, nearest: str = ""):
        self.op, self.implementation = op, implementation
        self.argument, self.nearest = argument, nearest
        hint = f"; supported: {nearest}" if nearest else ""
        super().__init__(f"{op}[{implementation}] does not support {argument}{hint}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What the dispatcher did for one op, most recent call.

    Attributes:
        op: Name of the op.
        implementation: The one taken.
        passed_over: Reason for each implementation that was tried first and refused.
    """

    op: str
    implementation: str
    passed_over: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether one implementation can serve a call; see `explain`.

    Attributes:
        op: Name of the op.
        implementation: Its name.
        rank: Place in the order of preference, 0 first; None: taken only by name.
        reason: Why it cannot serve the call; empty if it can.
        certain: False if this machine lacks what is needed to tell; `reason` says what.
    """

    op: str
    implementation: str
    rank: int | None
    reason: str = ""
    certain: bool = True

    @property
    def serves(self) -> bool:
        """Whether the chooser may take it; the first one that does is taken."""
        return self.rank is not None and not self.reason


_explanations: list[list[Verdict]] = []
_forced: list[tuple[str, str | None]] = []
_choices: dict[str, Choice] = {}
_logged: set[tuple[str, str]] = set()


@contextlib.contextmanager
def force_implementation(implementation: str, *, op: str | None = None) -> Iterator[None]:
    """Make every op (or only `op`) use `implementation` where the caller named none.

    For ablations and tests. It acts while a function is traced: wrap the first call of a jitted
    function, not a later one. Forced on every op, it leaves those that lack it their own choice. It
    holds for the whole process, so for what other threads trace meanwhile too.

    Raises:
        ValueError: `op` is no op or lacks the implementation, or no op has it; said on entry.

    >>> with force_implementation("xla"):
    ...     pass
    """
    _check_forced(implementation, op)
    _forced.append((implementation, op))
    try:
        yield
    finally:
        _forced.pop()


def _check_forced(implementation: str, op: str | None) -> None:
    """Refuse names that would force nothing."""
    if op is not None and op not in OPS:
        raise ValueError(f"op must be one of {', '.join(sorted(OPS))}; got {op!r}")
    known = OPS[op] if op is not None else {name for names in OPS.values() for name in names}
    if implementation not in known:
        raise ValueError(_must_be(op, known, implementation))


def _must_be(op: str | None, known: Iterable[str], got: Implementation) -> str:
    of = "implementation" if op is None else f"implementation of {op}"
    return f"{of} must be among {sorted(known)}; got {got!r}"


def is_forced(op: str) -> bool:
    """Whether an implementation is forced on this op by its name."""
    return any(only == op for _, only in _forced)


Forced = tuple[tuple[str, str | None], ...]  # implementations, and the op of each (None: all)


def parse_forced(text: str | None) -> Forced:
    """What to force, out of one text: an implementation for every op, or some for named ops.

    Args:
        text: `"xla"`, or `"matmul=xla,decode_attention=xla"`; None: nothing.

    Raises:
        ValueError: a name is missing.

    >>> parse_forced("cudnn"), parse_forced("matmul=xla,attention=cudnn")
    ((('cudnn', None),), (('xla', 'matmul'), ('cudnn', 'attention')))
    """
    if text is None:
        return ()
    forced: list[tuple[str, str | None]] = []
    for part in text.split(","):
        op, has_op, name = part.strip().rpartition("=")
        if not name or (has_op and not op):
            raise ValueError(
                f"implementation must be a name, or op=name with commas between; got {text!r}"
            )
        forced.append((name, op or None))
    return tuple(forced)


@contextlib.contextmanager
def force_all(forced: Forced) -> Iterator[None]:
    """`force_implementation` for each.

    Raises:
        ValueError: as there.
    """
    with contextlib.ExitStack() as stack:
        for implementation, op in forced:
            stack.enter_context(force_implementation(implementation, op=op))
        yield


@contextlib.contextmanager
def explain() -> Iterator[list[Verdict]]:
    """Ask every implementation of the ops called inside whether it can serve the call.

    Call the ops through `jax.eval_shape`, so that nothing is computed. What JAX has traced before
    is not asked again: give it a new function each time, such as a lambda. Holds for the whole
    process, as `force_implementation`.

    >>> with explain() as verdicts:
    ...     choose("op", None, {"xla": lambda: 1}, ("xla",))
    1
    >>> verdicts[0].implementation, verdicts[0].reason
    ('xla', '')
    """
    verdicts: list[Verdict] = []
    _explanations.append(verdicts)
    try:
        yield verdicts
    finally:
        _explanations.pop()


def supported(op_function: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, str]:
    """Which implementations of an op can serve a call on this machine, without computing it.

    Args:
        op_function: An op such as `attention`, or a function of several calls: an implementation
            must then serve all. Not one that `jax.jit` has compiled, which is not traced again.
        *args: As for the op; arrays or `jax.ShapeDtypeStruct`s.
        **kwargs: As for the op.

    Returns:
        By name of the implementation, why it cannot serve the call; empty if it can.

    Raises:
        ValueError, TypeError: arguments that the op refuses whatever implements it.

    >>> from jaxinfer.pallas_kernels import matmul, supported
    >>> x, weight = jax.ShapeDtypeStruct((1, 64), "bfloat16"), jax.numpy.ones((64, 64), "bfloat16")
    >>> reasons = supported(matmul, x, weight)
    >>> sorted(reasons), reasons["xla"]
    (['mosaic', 'xla'], '')
    """
    arrays = {name: value for name, value in kwargs.items() if hasattr(value, "shape")}
    options = {name: value for name, value in kwargs.items() if name not in arrays}
    reasons: dict[str, str] = {}
    # That none can serve the call is an answer here.
    with explain() as verdicts, contextlib.suppress(ExceptionGroup):
        jax.eval_shape(lambda *a, **k: op_function(*a, **k, **options), *args, **arrays)
    for verdict in verdicts:
        reasons[verdict.implementation] = reasons.get(verdict.implementation) or verdict.reason
    return reasons


def choices() -> dict[str, Choice]:
    """The choice of every op traced so far in this process, by op name.

    Only the latest of each op: calls of other shapes, which may have got another implementation,
    are forgotten. `explain` tells them apart.
    """
    return dict(_choices)


def choose(
    op: str,
    implementation: Implementation,
    candidates: Mapping[str, Callable[[], Any]],
    preferred: Sequence[str],
) -> Any:
    """Run the implementation asked for, or the first of `preferred` that can serve the call.

    Args:
        op: Name of the op, for messages.
        implementation: A name: only that one, and its error surfaces. A sequence: these, in
            order. None: `preferred`, in order, after anything forced.
        candidates: Every implementation the op has, each a thunk that raises `NotSupported`
            before computing if it cannot serve the call.
        preferred: Order for `None`; the measured choice first.

    Raises:
        ValueError: an unknown implementation was named, or forced on this op by its name.
        NotSupported: the only one named cannot serve the call.
        ExceptionGroup: none of several can.
    """
    order = _order(op, implementation, candidates, preferred)
    if _explanations:
        return _ask_all(op, candidates, order, _explanations[-1])
    reasons: list[NotSupported] = []
    for name in order:
        try:
            result = candidates[name]()
        except NotSupported as reason:
            if len(order) == 1:
                raise
            reasons.append(reason)
            continue
        _record(op, name, reasons)
        return result
    raise ExceptionGroup(f"{op}: no implementation can serve this call", reasons)


def _ask_all(
    op: str,
    candidates: Mapping[str, Callable[[], Any]],
    order: Sequence[str],
    verdicts: list[Verdict],
) -> Any:
    """Record a verdict for each implementation; the result of the first that can serve.

    Those of ops that an implementation calls come before.
    """
    results, errors, found = [], [], []
    for name in [*order, *(name for name in candidates if name not in order)]:
        reason, certain = "", True
        try:
            results.append(candidates[name]())
        except Exception as error:  # not only NotSupported: this machine may lack the device
            reason, certain = str(error), isinstance(error, NotSupported)
            errors.append(error)
        rank = order.index(name) if name in order else None
        found.append(Verdict(op=op, implementation=name, rank=rank, reason=reason, certain=certain))
    verdicts += found
    if not results:
        raise ExceptionGroup(f"{op}: no implementation can serve this call", errors)
    return results[0]


def _order(
    op: str,
    implementation: Implementation,
    candidates: Mapping[str, Callable[[], Any]],
    preferred: Sequence[str],
) -> list[str]:
    if implementation is None:
        for name, only in reversed(_forced):
            if only in (None, op) and name in candidates:
                return [name]
            if only == op:
                raise ValueError(_must_be(op, candidates, name))
        return list(preferred)
    several = isinstance(implementation, Iterable) and not isinstance(implementation, str)
    names: list[Any] = list(implementation) if several else [implementation]
    unknown = [name for name in names if not isinstance(name, str) or name not in candidates]
    if unknown or not names:
        raise ValueError(_must_be(op, candidates, implementation))
    return names


def _record(op: str, name: str, reasons: Sequence[NotSupported]) -> None:
    passed_over = tuple(str(reason) for reason in reasons)
    _choices[op] = Choice(op=op, implementation=name, passed_over=passed_over)
    for reason in reasons:
        if (op, str(reason)) not in _logged:
            _logged.add((op, str(reason)))
            # Not the call but the installation is at fault, and whoever made it can mend it.
            level = logging.WARNING if reason.argument.startswith("JAX ") else logging.INFO
            logger.log(level, "%s; using %s", reason, name)
