"""How `watched` begins, and reports an error, in one process; `test_processes.py` has several."""

import jax
import pytest

from jaxinfer.distributed import watched, watching


def test_a_limit_that_is_none():
    with pytest.raises(ValueError, match="timeout_s must be positive; got 0"), watched(0):
        pass


def test_there_must_be_others():
    with pytest.raises(RuntimeError, match=r"call jax\.distributed\.initialize first"), watched():
        pass


@pytest.mark.parametrize(
    ("error", "code", "reason", "written"),
    [
        (ValueError("two\nlines"), 1, "ValueError: two lines", "ValueError: two\nlines\n"),
        (KeyboardInterrupt(), 130, "interrupted", "KeyboardInterrupt\n"),
        (SystemExit(3), 3, "it has exited with 3", ""),
        (SystemExit(), 0, "it has exited with 0", ""),
        (SystemExit("no model"), 1, "no model", "no model\n"),
    ],
)
def test_an_error_is_shown_as_python_does(capsys, error, code, reason, written):
    assert watching._show(error) == (code, reason)
    assert capsys.readouterr().err == written


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("Gloo all-reduce failed: Connection closed by peer",
         "the connection to another process was lost (Gloo all-reduce failed: Connection closed"),
        ("UNAVAILABLE: Socket closed\nRPC: /xla.coordination.CoordinationService/GetKeyValue",
         "process 0, the coordinator, cannot be reached any more"),
    ],
)  # fmt: skip
def test_another_process_that_has_gone(capsys, text, meant):
    code, reason = watching._show(jax.errors.JaxRuntimeError(text))
    assert code == 1
    assert reason.startswith(meant)
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {reason}"


def test_other_errors_of_jax_mean_what_they_say():
    other = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    assert watching.meaning(other) is other
