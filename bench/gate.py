"""No time for a wrong answer: the check that comes before every row."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.case import WrongResult
from tests.metrics import TOLERANCES, relative_rms


def check(got: Any, want: Any, dtype: str) -> float:
    """The largest relative RMS error of the arrays of a result.

    Args:
        got: A result, any tree of arrays.
        want: The reference's, the same tree.
        dtype: Whose tolerance holds (`tests/metrics.py`).

    Raises:
        WrongResult: the error exceeds the tolerance, or numbers that are not finite differ.
    """
    got_leaves, want_leaves = jax.tree.leaves(got), jax.tree.leaves(want)
    if len(got_leaves) != len(want_leaves):
        raise WrongResult(f"{len(got_leaves)} arrays came, {len(want_leaves)} were expected")
    return max(_error(*pair, dtype) for pair in zip(got_leaves, want_leaves, strict=True))


def check_on_devices(got: jax.Array, want: jax.Array, dtype: str) -> float:
    """As `check`, of one array that is too large to be fetched; all of it must be finite.

    Args:
        got: A result.
        want: The reference's, of the same sharding.
        dtype: As in `check`.

    Raises:
        WrongResult: the error exceeds the tolerance, or a number is not finite.
    """
    if got.shape != want.shape:
        raise WrongResult(f"shape {got.shape}, expected {want.shape}")
    error, size = (float(x) for x in _norms(got, want))
    if not np.isfinite([error, size]).all():
        raise WrongResult("entries that should be finite are not")
    return _within(error / size if size else error, dtype)


@jax.jit
def _norms(got: jax.Array, want: jax.Array) -> tuple[jax.Array, jax.Array]:
    wide = want.astype(jnp.float32)
    return jnp.linalg.norm((got.astype(jnp.float32) - wide).ravel()), jnp.linalg.norm(wide.ravel())


def _within(error: float, dtype: str) -> float:
    limit = TOLERANCES[dtype][0]
    if error > limit:
        raise WrongResult(f"relative RMS error {error:.1e} exceeds {limit:.1e}")
    return error


def _error(got: jax.Array, want: jax.Array, dtype: str) -> float:
    if got.shape != want.shape:
        raise WrongResult(f"shape {got.shape}, expected {want.shape}")
    got_np, want_np = (np.asarray(x, np.float32) for x in (got, want))
    finite = np.isfinite(want_np)
    if not np.array_equal(np.where(finite, 0, got_np), np.where(finite, 0, want_np)):
        raise WrongResult("entries that should not be finite are others than expected")
    if not np.isfinite(got_np[finite]).all():
        raise WrongResult("entries that should be finite are not")
    return _within(relative_rms(got_np[finite], want_np[finite]), dtype)
