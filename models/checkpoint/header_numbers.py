"""Numbers of a file's header: checked where they are read, so that a message has their name."""

import math
from typing import Any

import numpy as np


def whole(value: Any, name: str, *, least: int = 1) -> int:
    """A whole number of at least `least`.

    Args:
        value: What the file holds.
        name: What the file calls it, for messages.
        least: The smallest that makes sense.

    Raises:
        ValueError: it is something else.
    """
    number = _float(value)
    if not (math.isfinite(number) and number.is_integer() and number >= least):
        raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r:.80}")
    return value if isinstance(value, int) else int(number)


def positive(value: Any, name: str) -> float:
    """A finite number above 0; see `whole`."""
    number = _float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} must be finite and positive; got {value!r:.80}")
    return number


def not_negative(value: Any, name: str) -> float:
    """A finite number of at least 0; see `whole`."""
    number = _float(value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name} must be finite and not negative; got {value!r:.80}")
    return number


def between(value: Any, name: str, least: float, most: float) -> float:
    """A number from `least` to `most`; see `whole`."""
    number = _float(value)
    if not least <= number <= most:
        raise ValueError(f"{name} must be between {least:g} and {most:g}; got {value!r:.80}")
    return number


def token_ids(value: Any, name: str) -> tuple[int, ...]:
    """Token ids, of which a file holds one, a list, or null for none; see `whole`."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        raise ValueError(f"{name} must be a token id or a list of them; got {value!r:.80}")
    return tuple(ids)


def _float(value: Any) -> float:
    """As float64; NaN, which no check lets pass, for what is no number."""
    if isinstance(value, bool | np.ndarray):
        return math.nan
    try:
        return float(value)
    except (ArithmeticError, TypeError, ValueError):
        return math.nan
