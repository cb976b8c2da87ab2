"""The key-value store of JAX's coordinator: what processes tell each other beside collectives.

JAX has no public name for it, so everything that needs the private one is here. A collective would
do too, but it compiles a program, cannot be waited for with a time limit, and is no help against a
process that has died in one.
"""

from typing import Any

import jax
from jax._src import distributed

_PIECE = 1 << 20  # bytes of one value; gRPC limits its messages to 4 MiB
_LONGEST_MS = 24 * 3600 * 1000  # `Watch` ends those who wait for one that is lost
_ROUND_MS = 500  # so often a waiting process looks whether it was interrupted


class Store:
    """Bytes by name, the same in all processes.

    Attributes:
        index: Of this process.
        count: Of processes, as this one was told.
    """

    def __init__(self) -> None:
        """Use the coordinator that `jax.distributed.initialize` has connected to."""
        state = distributed.global_state
        self._client: Any = state.client
        # Not `jax.process_index()`, for which all processes have to start their devices first.
        self.index, self.count = state.process_id, state.num_processes

    def put(self, key: str, value: str) -> None:
        """Set a short text, in place of an earlier one."""
        self._client.key_value_set(key, value, allow_overwrite=True)

    def listing(self, folder: str) -> dict[str, str]:
        """All texts below `folder`, by the last part of their names."""
        found = self._client.key_value_dir_get(folder)
        return {key.rpartition("/")[2]: value for key, value in found}

    def publish(self, key: str, value: bytes) -> None:
        """Set bytes of any length, once, for `wait`."""
        pieces = [value[at : at + _PIECE] for at in range(0, len(value), _PIECE)]
        for number, piece in enumerate(pieces):
            self._client.key_value_set_bytes(f"{key}/{number}", piece)
        self._client.key_value_set_bytes(f"{key}/count", str(len(pieces)).encode())

    def wait(self, key: str) -> bytes:
        """What another process publishes, once it has."""
        count = int(self._wait(f"{key}/count"))
        return b"".join(self._wait(f"{key}/{number}") for number in range(count))

    def meet(self, name: str) -> None:
        """Wait until all processes have come here."""
        self._client.wait_at_barrier(name, _LONGEST_MS)

    def _wait(self, key: str) -> bytes:
        # In rounds: Ctrl-C is not noticed inside of a call.
        while True:
            try:
                return self._client.blocking_key_value_get_bytes(key, _ROUND_MS)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
