"""The reference of `rope_kv_write`, comparing the four results, and tokens that go nowhere."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.pallas_kernels.rope_kv_write.reference import rope_kv_write_reference
from jaxinfer.pallas_kernels.rope_kv_write.specs import RopeWriteSpec
from tests.metrics import assert_dtype_close
from tests.ops.cases import quick_compilation

RESULTS = ("q", "k", "k_pages", "v_pages")


def call_reference(*arrays):
    """Compiled once; tables and counts stay numbers."""
    tables = [np.asarray(x) for x in arrays[7:]]
    with quick_compilation():
        return jax.jit(lambda *floats: rope_kv_write_reference(*floats, *tables))(*arrays[:7])


def check(spec, got, want, *, dtype=None) -> None:
    """Fail unless rotated q and k and both pools agree, within the rounding of `dtype`."""
    for one, expected, label in zip(got, want, RESULTS, strict=True):
        assert one.dtype == spec.dtype, label
        assert_dtype_close(one, expected, dtype or spec.dtype, label)


# Nine requests of four tokens, with two pages of 16 each.
STRAYS = RopeWriteSpec(model="strays", B=9, T=4, N=3, K=1, H=64, page_size=16, start=28)
# Page and slot of their tokens, as `astray` has them, that go somewhere.
STRAY_SLOTS = {
    (page, slot + i) for page, slot in ((0, 0), (3, 14), (5, 0), (7, 0), (9, 0), (11, 0))
    for i in (0, 1)
}  # fmt: skip


def astray(arrays: tuple) -> tuple:
    """Arguments of a call for nine requests that leave the table or the pool, if only in part.

    Request b has pages 2b and 2b + 1; the first of its pages does not exist for b = 2 … 5.
    """
    *floats, _, _, counts = arrays
    least, largest = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    start = np.array([-2, 30, 14, 14, 14, 14, 32, least, largest], np.int32)
    table = np.arange(18, dtype=np.int32).reshape(9, 2)
    table[2:6, 0] = -1, arrays[5].shape[0], least, largest
    return *floats, jnp.asarray(table), jnp.asarray(start), counts


def changed_slots(pool, before) -> set[tuple[int, int]]:
    """Page and slot of whatever was written."""
    changed = (np.asarray(pool) != np.asarray(before)).any(axis=(1, 3))
    return {(int(page), int(slot)) for page, slot in np.argwhere(changed)}
