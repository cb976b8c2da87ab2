"""Look at the arguments of an op while a function is traced: what calibration is made of."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

_observers: list[tuple[str, Callable[..., None]]] = []


@contextlib.contextmanager
def observe(op: str, look: Callable[..., None]) -> Iterator[None]:
    """Call `look` with the arguments of every call of an op inside.

    Ops are called while a function is traced: what `look` sees belongs to that trace. To get
    anything out, observe inside the function and return it. One process, one thread.

    Args:
        op: Name of an op that notifies: `"attention"`, of its arguments; `"decode_attention"`, of
            the fallbacks of its unified softmax.
        look: Called with keywords, see the op's `notify`.
    """
    _observers.append((op, look))
    try:
        yield
    finally:
        _observers.pop()


def notify(op: str, **call: Any) -> None:
    """Tell the observers of an op about a call."""
    for name, look in _observers:
        if name == op:
            look(**call)
