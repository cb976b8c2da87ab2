"""Comparing the four results of `rope_kv_write`."""

from tests.metrics import assert_dtype_close

RESULTS = ("q", "k", "k_pages", "v_pages")


def check(spec, got, want, *, dtype=None) -> None:
    """Fail unless rotated q and k and both pools agree, within the rounding of `dtype`."""
    for one, expected, label in zip(got, want, RESULTS, strict=True):
        assert one.dtype == spec.dtype, label
        assert_dtype_close(one, expected, dtype or spec.dtype, label)
