"""Debug mode: with JAXINFER_DEBUG=1 in the environment, ops check values and not only shapes.

The environment is read while a function is traced: what was traced before stays as it is.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def is_debugging() -> bool:
    """Whether the environment asks for checks that cost time."""
    return os.environ.get("JAXINFER_DEBUG") == "1"


def checked_pages(
    page_table: jax.Array,
    lengths: jax.Array | None,
    *,
    name: str,
    page_size: int,
    num_pages: int,
) -> tuple[jax.Array, jax.Array | None]:
    """Page table and lengths as they are; in debug mode, once they and the pages are in range.

    In a compiled function both come by way of the host, so that nobody follows them before they
    are checked, and XLA, which may need only one, keeps the check. What fails there is an error of
    JAX that has the text of the `ValueError`.

    Args:
        page_table: `[B, M]` integers.
        lengths: `[B]` integers, keys of each row; None: all M·p.
        name: What the caller calls `lengths`.
        page_size: p.
        num_pages: P.

    Raises:
        ValueError: in debug mode, a length or a page number that is out of range.
    """
    if not is_debugging():
        return page_table, lengths
    checked = functools.partial(_checked, name=name, page_size=page_size, num_pages=num_pages)
    if not isinstance(page_table, Tracer) and not isinstance(lengths, Tracer):
        checked(page_table, lengths)
        return page_table, lengths
    given = jax.tree.map(jnp.asarray, (page_table, lengths))
    results = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), given)
    return jax.pure_callback(checked, results, *given, vmap_method="sequential")


def _checked(
    page_table: jax.Array, lengths: jax.Array | None, *, name: str, page_size: int, num_pages: int
) -> tuple[np.ndarray, np.ndarray | None]:
    table = np.asarray(page_table)
    B, M = table.shape
    most = M * page_size
    keys = np.full(B, most) if lengths is None else np.asarray(lengths)
    for row in np.flatnonzero((keys < 0) | (keys > most)):
        raise ValueError(
            f"{name} must be 0 … {most}, the keys that a row has room for; "
            f"got {keys[row]} in row {row}"
        )
    reached = np.arange(M) * page_size < keys[:, None]
    for row, entry in np.argwhere(reached & ((table < 0) | (table >= num_pages))):
        raise ValueError(
            f"page_table must name pages 0 … {num_pages - 1} where {name} reach; "
            f"got {table[row, entry]} in row {row}, entry {entry}"
        )
    return table, None if lengths is None else keys
