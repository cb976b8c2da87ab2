"""The gate: no time for a wrong answer."""

import jax.numpy as jnp
import numpy as np
import pytest

from bench.case import Implementation, OpCase, WrongResult
from bench.gate import check, check_on_devices

WANT = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)


def test_a_right_result_passes_with_its_error():
    assert check(WANT, WANT, "float32") == 0.0
    error = check(WANT * (1 + 1e-3), WANT, "bfloat16")
    assert error == pytest.approx(1e-3, rel=1e-2)


def test_the_largest_error_of_several_arrays_counts():
    assert check((WANT, WANT * 1.001), (WANT, WANT), "bfloat16") == pytest.approx(1e-3, rel=1e-2)


def test_a_wrong_result_is_refused():
    with pytest.raises(WrongResult, match=r"error 1\.0e-02 exceeds 6\.0e-03"):
        check(WANT * 1.01, WANT, "bfloat16")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(bad):
    with pytest.raises(WrongResult, match="finite"):
        check(WANT.at[1, 1].set(bad), WANT, "bfloat16")


def test_a_large_array_is_judged_where_it_is():
    assert check_on_devices(WANT, WANT, "float32") == 0.0
    wrong = (WANT * 1.001).astype(jnp.bfloat16)
    assert check_on_devices(wrong, WANT, "bfloat16") == pytest.approx(
        check(wrong, WANT, "bfloat16"), rel=1e-3
    )
    with pytest.raises(WrongResult, match=r"error 1\.0e-02 exceeds 6\.0e-03"):
        check_on_devices(WANT * 1.01, WANT, "bfloat16")
    with pytest.raises(WrongResult, match="finite"):
        check_on_devices(WANT.at[1, 1].set(jnp.nan), WANT, "bfloat16")
    with pytest.raises(WrongResult, match=r"shape \(4, 3\), expected \(3, 4\)"):
        check_on_devices(WANT.T, WANT, "bfloat16")


def test_infinities_where_they_belong_are_accepted():
    want = WANT.at[0, 0].set(-jnp.inf)
    assert check(want, want, "float32") == 0.0
    with pytest.raises(WrongResult, match="finite"):
        check(WANT, want, "float32")


def test_another_shape_is_refused():
    with pytest.raises(WrongResult, match=r"shape \(4, 3\), expected \(3, 4\)"):
        check(WANT.T, WANT, "float32")


def test_another_number_of_arrays_is_refused():
    with pytest.raises(WrongResult, match="2 arrays came, 1 were expected"):
        check((WANT, WANT), WANT, "float32")


def test_a_case_with_a_wrong_implementation_gives_no_time():
    case = OpCase(
        op="twice", name="twice", tag="ci", flops=1.0, bytes=1.0, dtype="float32",
        make_inputs=lambda key: (WANT,), reference=lambda x: 2 * x,
        table={
            "right": Implementation(call=lambda x: x + x),
            "wrong": Implementation(call=lambda x: x * x),
        },
    )  # fmt: skip
    assert case.implementations == ("right", "wrong")
    assert case.measure("right", repeats=2).median_us > 0
    with pytest.raises(WrongResult):
        case.measure("wrong", repeats=2)
