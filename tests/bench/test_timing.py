"""An implementation and its clock, on a CPU."""

import jax.numpy as jnp
import numpy as np
import pytest

from bench.case import Implementation
from bench.timing import Compiled, Timing, compile_all, time_calls
from jaxinfer.pallas_kernels.device import CPU, use_device


@pytest.fixture(autouse=True)
def on_a_cpu():
    """The wall clock, whatever the machine has."""
    with use_device(CPU):
        yield


def timed(implementation, inputs, repeats) -> Timing:
    compiled = compile_all({"it": implementation}, lambda _: inputs)["it"]
    assert isinstance(compiled, Compiled)
    return time_calls(implementation, compiled, inputs, repeats=repeats)


def test_several_are_compiled_and_one_that_cannot_be_costs_no_other():
    def refuse(x):
        raise ValueError("no")

    calls = {"twice": lambda x: 2 * x, "refused": refuse, "thrice": lambda x: 3 * x}
    table = {name: Implementation(call=call) for name, call in calls.items()}
    notes = iter("abc")
    found = compile_all(table, lambda _: (jnp.float32(1),), lambda: next(notes))
    assert isinstance(found["refused"], ValueError)
    twice, thrice = found["twice"], found["thrice"]
    assert isinstance(twice, Compiled)
    assert isinstance(thrice, Compiled)
    assert (twice.note, thrice.note) == ("a", "b")
    assert (twice.call(jnp.float32(1)), thrice.call(jnp.float32(1))) == (2, 3)
    assert min(twice.seconds, thrice.seconds) > 0


def test_what_is_compiled_again_is_noted_again():
    """The note is of what tracing chose, so each time there must be tracing."""
    traced = []
    calls = {name: lambda x, name=name: traced.append(name) or x for name in "ab"}
    table = {name: Implementation(call=call) for name, call in calls.items()}
    for names in ("ab", "ba"):
        wanted = {name: table[name] for name in names}
        found = compile_all(wanted, lambda _: (jnp.float32(1),), lambda: traced[-1])
        for name in names:
            compiled = found[name]
            assert isinstance(compiled, Compiled)
            assert compiled.note == name


def test_times_and_result_of_a_plain_function():
    traced = []

    def call(x):
        traced.append(x)
        return 2 * x

    measured = timed(Implementation(call=call), (jnp.arange(4.0),), repeats=5)
    assert len(measured.times_us) == 5
    assert min(measured.times_us) > 0
    assert measured.compile_s > 0
    assert len(traced) == 1, "compiled once"
    np.testing.assert_array_equal(measured.result, [0, 2, 4, 6])


def test_donated_arguments_are_renewed_and_the_first_result_is_kept():
    seen = []

    def renew(arrays, result):
        seen.append(float(result[1][0]))
        return arrays[0], result[1]

    implementation = Implementation(
        call=lambda x, pool: (x.sum(), pool + x), donate=(1,), renew=renew
    )
    inputs = jnp.ones(3), jnp.zeros(3)
    measured = timed(implementation, inputs, repeats=3)
    assert inputs[1].is_deleted()
    assert not inputs[0].is_deleted()
    assert seen == [1, 2, 3, 4], "each call takes the pool of the one before"
    np.testing.assert_array_equal(measured.result[1], [1, 1, 1])


def test_donation_without_renewal_fails_instead_of_timing_garbage():
    implementation = Implementation(call=lambda pool: pool + 1, donate=(0,))
    with pytest.raises((RuntimeError, ValueError), match="deleted"):
        timed(implementation, (jnp.zeros(3),), repeats=2)


def test_what_counts_as_the_result_is_the_implementations_to_say():
    implementation = Implementation(call=lambda x: (x, x + 1), result=lambda pair: pair[1])
    assert float(timed(implementation, (jnp.float32(1),), repeats=1).result) == 2
