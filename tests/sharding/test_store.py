"""What processes tell each other, with a dictionary in place of JAX's coordinator."""

import jax
import pytest

from jaxinfer.distributed import store
from jaxinfer.distributed.store import Store


class Client:
    """Finds a value only when it is asked the second time."""

    def __init__(self):
        self.values: dict[str, bytes] = {}
        self.asked: set[str] = set()

    def key_value_set_bytes(self, key: str, value: bytes) -> None:
        assert len(value) <= 4
        assert key not in self.values
        self.values[key] = value

    def blocking_key_value_get_bytes(self, key: str, timeout_in_ms: int) -> bytes:
        if key in self.asked:
            return self.values[key]
        self.asked.add(key)
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out")


@pytest.fixture
def shared(monkeypatch) -> Store:
    monkeypatch.setattr(store, "_PIECE", 4)
    made = Store()
    made._client = Client()
    return made


@pytest.mark.parametrize("value", [b"", b"four", b"more than four"])
def test_bytes_of_any_length_arrive(shared, value):
    shared.publish("plan", value)
    assert shared.wait("plan") == value


def test_other_errors_are_not_waited_through(shared, monkeypatch):
    def gone(key, timeout):
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed")

    monkeypatch.setattr(shared._client, "blocking_key_value_get_bytes", gone)
    with pytest.raises(RuntimeError, match="Socket closed"):
        shared.wait("plan")
