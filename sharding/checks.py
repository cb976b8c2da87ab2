"""Checks of arguments that the schedules and the cost model share."""

import math
import operator


def at_least(name: str, value: object, least: int, why: str = "") -> int:
    """Return an integer argument, refusing other types and smaller values.

    Raises:
        TypeError: If `value` is not an integer (a bool is not one here).
        ValueError: If it is below `least`.
    """
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer; got {value}")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer; got {value!r}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}{why}; got {number}")
    return number


def positive(name: str, value: float, *, zero: bool = False) -> None:
    """Refuse a quantity that is not finite, or not above zero (`zero` allows it).

    Raises:
        ValueError: Naming the quantity.
    """
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        least = "zero or a positive" if zero else "a positive"
        raise ValueError(f"{name} must be {least}, finite number; got {value}")
