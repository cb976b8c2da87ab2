"""One metric for all kernels: relative RMS error and the largest absolute error."""

import numpy as np

# (relative RMS, max abs of unit-scale data). A bf16 result is rounded to 8 bits (2^-9 relative),
# its inputs were rounded before both sides saw them, and probabilities are rounded once more
# before P·V; float32 differs by the order of summation only.
TOLERANCES = {
    "float32": (1e-5, 1e-4),
    "bfloat16": (6e-3, 6e-2),
    "float16": (1e-3, 1e-2),
}


def relative_rms(got: np.ndarray, want: np.ndarray) -> float:
    """‖got − want‖ / ‖want‖ in float64; 0 when both are zero."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    error, size = np.linalg.norm(got - want), np.linalg.norm(want)
    return float(error / size) if size else float(error)


def assert_close(got, want, *, rms: float, max_abs: float, label: str = "result") -> None:
    """Fail unless shapes agree, non-finite entries coincide, and both error measures hold."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{label}: shape {got.shape}, expected {want.shape}"
    finite = np.isfinite(want)
    np.testing.assert_array_equal(
        np.where(finite, 0, want), np.where(finite, np.where(np.isfinite(got), 0, got), got),
        err_msg=f"{label}: non-finite entries differ",
    )  # fmt: skip
    got, want = got[finite], want[finite]
    error = relative_rms(got, want)
    worst = float(np.max(np.abs(got - want), initial=0.0))
    measured = f"{label}: relative rms {error:.2e}, max abs {worst:.2e}"
    assert error <= rms, f"{measured}; rms limit {rms:.1e}"
    assert worst <= max_abs, f"{measured}; max abs limit {max_abs:.1e}"


def assert_dtype_close(got, want, dtype, label: str = "result") -> None:
    """`assert_close` with the tolerances of `dtype`."""
    rms, max_abs = TOLERANCES[np.dtype(dtype).name]
    assert_close(got, want, rms=rms, max_abs=max_abs, label=label)
