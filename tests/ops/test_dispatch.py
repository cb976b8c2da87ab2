"""How an implementation is chosen, and what is said about it."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import pytest

from jaxinfer import Decoder, DecoderConfig, PagedKVCache, decode_step, prefill
from jaxinfer.pallas_kernels import dispatch
from jaxinfer.pallas_kernels.device import H100, use_device
from jaxinfer.pallas_kernels.dispatch import (
    OPS,
    Choice,
    NotSupported,
    choices,
    choose,
    explain,
    force_implementation,
    supported,
)


def refuse(name, argument="anything"):
    def thunk():
        raise NotSupported("op", name, argument, "nothing")

    return thunk


CANDIDATES = {"good": lambda: "good", "fine": lambda: "fine", "bad": refuse("bad"),
              "worse": refuse("worse")}  # fmt: skip


def pick(implementation=None, preferred=("bad", "good", "fine")):
    return choose("op", implementation, CANDIDATES, preferred)


@pytest.fixture(autouse=True)
def nothing_logged_yet(monkeypatch):
    monkeypatch.setattr(dispatch, "_logged", set())
    monkeypatch.setattr(dispatch, "_choices", {})


@pytest.fixture(autouse=True)
def ops_of_these_tests(monkeypatch):
    ours = {"op": tuple(CANDIDATES), "another": ("fine", "elsewhere")}
    monkeypatch.setattr(dispatch, "OPS", dispatch.OPS | ours)


@pytest.mark.parametrize(("implementation", "expected"), [
    (None, "good"), ("fine", "fine"), (["fine", "good"], "fine"),
    (("bad", "worse", "fine"), "fine"),
], ids=str)  # fmt: skip
def test_the_first_that_can_serve_is_taken(implementation, expected):
    assert pick(implementation) == expected
    assert choices()["op"].implementation == expected


@pytest.mark.parametrize("one", ["bad", ["bad"]], ids=str)
def test_the_only_one_named_says_why_not(one):
    with pytest.raises(NotSupported, match=r"^op\[bad\] does not support anything; supported:"):
        pick(one)
    assert choices() == {}


def test_none_of_several_can_serve():
    with pytest.raises(ExceptionGroup, match="op: no implementation can serve this call") as error:
        pick(None, preferred=("bad", "worse"))
    assert [str(reason)[:8] for reason in error.value.exceptions] == ["op[bad] ", "op[worse"]


@pytest.mark.parametrize("unknown", ["x", ["good", "x"], []], ids=str)
def test_unknown_names_are_refused_before_anything_runs(unknown):
    ran = []
    candidates = {"good": lambda: ran.append(1)}
    message = r"implementation of op must be among \['good'\]; got"
    with pytest.raises(ValueError, match=message):
        choose("op", unknown, candidates, ("good",))
    assert not ran


def test_other_errors_are_not_swallowed():
    def broken():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        choose("op", None, {"broken": broken, **CANDIDATES}, ("broken", "good"))


def test_not_supported_carries_its_parts():
    error = NotSupported("op", "bad", "H = 3")
    assert isinstance(error, NotImplementedError)
    assert (error.op, error.implementation) == ("op", "bad")
    assert (error.argument, error.nearest) == ("H = 3", "")
    assert str(error) == "op[bad] does not support H = 3"


def test_the_choice_names_what_was_passed_over():
    pick()
    reason = "op[bad] does not support anything; supported: nothing"
    assert choices() == {"op": Choice(op="op", implementation="good", passed_over=(reason,))}


def test_choices_are_a_copy():
    pick()
    choices().clear()
    assert "op" in choices()


def test_each_reason_is_logged_once(caplog):
    caplog.set_level(logging.INFO, "jaxinfer")
    for _ in range(3):
        pick()
    choose("op", None, {"bad": refuse("bad", "this"), "good": lambda: 1}, ("bad", "good"))
    assert caplog.messages == [
        "op[bad] does not support anything; supported: nothing; using good",
        "op[bad] does not support this; supported: nothing; using good",
    ]


def test_an_installation_that_lacks_a_kernel_is_a_warning(caplog):
    candidates = {"bad": refuse("bad", "JAX 0.12"), "good": lambda: 1}
    for _ in range(2):
        choose("op", None, candidates, ("bad", "good"))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "does not support JAX 0.12; supported: nothing; using good" in record.getMessage()


def test_force_acts_on_calls_that_name_nothing():
    with force_implementation("fine"):
        assert pick() == "fine"
        assert pick("good") == "good"
    assert pick() == "good"


def test_the_innermost_force_counts_and_ends_with_its_block():
    with force_implementation("good"):
        with force_implementation("fine"):
            assert pick() == "fine"
        assert pick() == "good"
        with pytest.raises(ZeroDivisionError), force_implementation("fine"):
            raise ZeroDivisionError
        assert pick() == "good"


def test_force_of_one_op_leaves_the_others():
    with force_implementation("fine", op="another"):
        assert pick() == "good"
    with force_implementation("fine", op="op"):
        assert pick() == "fine"


def test_an_op_without_the_forced_implementation_keeps_its_own():
    with force_implementation("fine"), force_implementation("elsewhere"):
        assert pick() == "fine"
    with force_implementation("elsewhere"):
        assert pick() == "good"


def test_a_forced_one_that_cannot_serve_says_why():
    with force_implementation("bad"), pytest.raises(NotSupported):
        pick()


@pytest.mark.parametrize(("implementation", "op", "message"), [
    ("nope", None, r"^implementation must be among \[.*'cudnn', .*'xla'\]; got 'nope'$"),
    ("xla", "foo", "^op must be one of add_rms_norm, .*, rope_kv_write; got 'foo'$"),
    ("mosaic", "attention",
     r"^implementation of attention must be among \['cudnn', .*'xla'\]; got 'mosaic'$"),
], ids=str)  # fmt: skip
def test_what_would_force_nothing_is_refused_on_entry(implementation, op, message):
    with pytest.raises(ValueError, match=message), force_implementation(implementation, op=op):
        pytest.fail("entered")
    with pytest.raises(ValueError, match=message), dispatch.force_all(((implementation, op),)):
        pytest.fail("entered")
    assert pick() == "good"


def test_an_op_that_lacks_what_is_forced_by_its_name_raises():
    """A candidate may be left out of a call; the default must not run in its place."""
    message = r"^implementation of op must be among \['good'\]; got 'fine'$"
    with force_implementation("good"), force_implementation("fine", op="op"):
        with pytest.raises(ValueError, match=message):
            choose("op", None, {"good": lambda: 1}, ("good",))
        assert choose("op", "good", {"good": lambda: 1}, ("good",)) == 1


def test_what_can_be_forced_is_what_the_ops_of_a_model_have():
    config = dataclasses.replace(DecoderConfig.llama3_8b(), num_layers=1)
    model = jax.eval_shape(lambda: Decoder(config, dtype=jnp.bfloat16))
    cache = jax.eval_shape(
        lambda: PagedKVCache.create(config, batch_size=1, max_len=64, dtype=jnp.bfloat16)
    )
    with use_device(H100), explain() as verdicts:
        for step, shape in ((prefill, (1, 8)), (decode_step, (1,))):
            tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
            jax.eval_shape(functools.partial(step), model, tokens, cache=cache)
    found: dict[str, set[str]] = {}
    for verdict in verdicts:
        found.setdefault(verdict.op, set()).add(verdict.implementation)
    assert {op: set(names) for op, names in OPS.items()} == found


def test_explain_asks_every_implementation():
    with explain() as verdicts:
        assert pick() == "good"
    told = [(v.implementation, v.rank, bool(v.reason), v.certain) for v in verdicts]
    assert told == [
        ("bad", 0, True, True), ("good", 1, False, True), ("fine", 2, False, True),
        ("worse", None, True, True),
    ]  # fmt: skip
    assert choices() == {}


def test_verdicts_of_a_call_stay_together():
    """Those of the ops that its implementations call come first."""

    def outer():
        return pick()

    with explain() as verdicts:
        choose("outer", None, {"outer": outer, "good": lambda: 1}, ("outer", "good"))
    assert [verdict.op for verdict in verdicts[-2:]] == ["outer", "outer"]
    assert "outer" not in {verdict.op for verdict in verdicts[:-2]}


def test_explain_is_uncertain_about_errors_of_the_machine():
    def broken():
        raise RuntimeError("no such device")

    with explain() as verdicts:
        choose("op", None, {"broken": broken, "good": lambda: 1}, ("broken", "good"))
    assert (verdicts[0].reason, verdicts[0].certain) == ("no such device", False)


def test_explain_when_none_can_serve():
    with explain() as verdicts, pytest.raises(ExceptionGroup):
        choose("op", None, {"bad": refuse("bad")}, ("bad",))
    assert len(verdicts) == 1


def test_explain_ends_with_its_block():
    with explain() as outer:
        with explain() as inner:
            pick()
        assert not outer
    assert len(inner) == len(CANDIDATES)
    pick()
    assert not outer


def op(x, y=None, *, size=1, implementation=None):
    """An op whose fast implementation takes short ones only, and whose x is never computed."""
    if size < 1:
        raise ValueError(f"size must be positive; got {size}")

    def fast():
        if x.shape[0] > size:
            raise NotSupported("op", "fast", f"{x.shape[0]} rows", f"{size}")
        return x

    def plain():
        return x if y is None else x + y

    def broken():
        raise RuntimeError("no driver")

    candidates = {"fast": fast, "plain": plain, "broken": broken}
    return choose("op", implementation, candidates, ("fast", "plain"))


SHORT, LONG = (jax.ShapeDtypeStruct((rows, 4), jnp.float32) for rows in (1, 3))
TOO_LONG = "op[fast] does not support 3 rows; supported: 1"


def test_supported_tells_every_implementation():
    for _ in range(2):  # what JAX has traced already is asked again
        assert supported(op, SHORT) == {"fast": "", "plain": "", "broken": "no driver"}
        assert supported(op, LONG) == {"fast": TOO_LONG, "plain": "", "broken": "no driver"}
    assert choices() == {}


def test_supported_takes_arguments_as_the_op_does():
    assert supported(op, LONG, size=3)["fast"] == ""
    assert supported(op, x=LONG, y=SHORT)["fast"] == TOO_LONG
    assert supported(op, jnp.ones((3, 4)), None, implementation="fast")["plain"] == ""
    with pytest.raises(ValueError, match="size must be positive; got 0"):
        supported(op, LONG, size=0)


def test_supported_where_none_can_serve():
    refusing = {"bad": refuse("bad", "this")}
    reasons = supported(lambda x: choose("op", None, refusing, ("bad",)), SHORT)
    assert reasons == {"bad": "op[bad] does not support this; supported: nothing"}


def test_supported_of_several_calls_is_what_serves_all():
    def both(short, long):
        return op(long), op(short)

    assert supported(both, SHORT, LONG)["fast"] == TOO_LONG
