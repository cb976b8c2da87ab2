"""Checks of arguments that several ops take."""

import math
import operator
from typing import Any

import jax.numpy as jnp
import numpy as np

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
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


def check_arrays(**arrays: Any) -> None:
    """Raise TypeError for arguments, by name, that are no arrays: of JAX, of NumPy or traced."""
    for name, array in arrays.items():
        if not (hasattr(array, "shape") and hasattr(array, "dtype")):
            raise TypeError(f"{name} must be an array; got {_kind(array)}")


def check_ranks(**arrays: tuple[Any, int]) -> None:
    """Refuse what is no array, has another rank than the one beside it, or is empty.

    Raises:
        TypeError: no array.
        ValueError: another rank, or empty.
    """
    check_arrays(**{name: array for name, (array, _) in arrays.items()})
    for name, (array, rank) in arrays.items():
        if array.ndim != rank:
            raise ValueError(f"{name} must have {rank} dimensions; got shape {array.shape}")
        if array.size == 0:
            raise ValueError(f"{name} must not be empty; got shape {array.shape}")


def check_dtype(name: str, array: Any) -> None:
    """Raise TypeError for an array of a dtype that no op computes with."""
    if array.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16 or float16; got {array.dtype}")


def check_config(config: Any, kind: type) -> None:
    """Raise TypeError for a tiling that is not of the op's class."""
    if config is not None and not isinstance(config, kind):
        raise TypeError(f"config must be a {kind.__module__}.{kind.__name__}; got {_kind(config)}")


def as_softcap(softcap: float | None) -> float | None:
    """A soft cap by which float32 can divide and multiply, or None.

    Raises:
        ValueError: it is too small or too large.
        TypeError: it is no number.
    """
    if softcap is None:
        return None
    number = _number("logits_softcap", softcap)
    if not _TINY <= number <= _HUGE:
        raise ValueError(f"logits_softcap must be positive and finite in float32; got {softcap}")
    return number


def as_scale(scale: float | None, *, head_dim: int) -> float:
    """The factor on q·k; default 1/sqrt(H).

    Raises:
        ValueError: it is not finite in float32.
        TypeError: it is no number.
    """
    if scale is None:
        return head_dim**-0.5
    number = _number("scale", scale)
    if not abs(number) <= _HUGE:
        raise ValueError(f"scale must be finite in float32; got {scale}")
    return number


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, str | bytes | bytearray):  # float() would read it
            raise TypeError
        return float(value)
    except OverflowError:  # an integer
        return math.inf
    except (TypeError, ValueError) as error:  # a traced value among them
        raise TypeError(
            f"{name} must be a number, known when the call is traced; got {_kind(value)}"
        ) from error


def _kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__
