"""Checks of arguments that both attentions take."""

import operator

import numpy as np

_TINY, _HUGE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def window_sides(window: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """Left and right of a `local_window_size`, or None where there is none.

    Raises:
        ValueError: sides that are not two, or negative.
        TypeError: sides that are no integers.
    """
    if window is None:
        return None
    sides = window if isinstance(window, tuple | list) else (window, window)
    if len(sides) != 2:
        raise ValueError(f"local_window_size must be an int or (left, right); got {window}")
    try:
        left, right = (operator.index(side) for side in sides)
    except TypeError as error:
        raise TypeError(f"local_window_size must be of integers; got {window!r}") from error
    if left < 0 or right < 0:
        raise ValueError(f"local_window_size must not be negative; got {window}")
    return left, right


def check_softcap(softcap: float | None) -> None:
    """Raise ValueError for a soft cap by which float32 cannot divide and multiply."""
    if softcap is not None and not _TINY <= softcap <= _HUGE:
        raise ValueError(f"logits_softcap must be positive and finite in float32; got {softcap}")
