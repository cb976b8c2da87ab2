"""`Group`: the processes that compute together, as one of them sees them."""

import itertools
import json
from typing import Any

import jax

from jaxinfer.distributed.store import Store
from jaxinfer.distributed.watch import Watch

_NUMBERS = itertools.count()  # all processes make their groups in the same order


class Group:
    """All processes run the same programs in the same order, on what process 0 has decided.

    Attributes:
        index: Of this process.
        count: Of processes.
        watch: Ends this process if another one is lost.
    """

    def __init__(self, heartbeat_timeout_s: float):
        """Join the others, after `jax.distributed.initialize`.

        Args:
            heartbeat_timeout_s: A process that is not heard of for so long is lost.
        """
        self._store = Store()
        self.index, self.count = self._store.index, self._store.count
        self._folder, self._shared = f"jaxinfer/{next(_NUMBERS)}", 0
        self.watch = Watch(self._store, self.index, self.count, heartbeat_timeout_s)

    @property
    def is_first(self) -> bool:
        """Whether this is process 0, which has the prompts and writes the answers."""
        return self.index == 0

    def share(self, value: Any = None) -> Any:
        """Give what process 0 has to all.

        Args:
            value: Of process 0: what JSON can express.

        Returns:
            The value of process 0, as it comes out of JSON.
        """
        key = f"{self._folder}/shared/{self._shared}"
        self._shared += 1
        if self.is_first:
            text = json.dumps(value)
            self._store.publish(key, text.encode())
            return json.loads(text)
        return json.loads(self._store.wait(key))

    def check_equal(self, what: str, value: str) -> None:
        """Refuse what differs from process 0: the processes would run different programs.

        Args:
            what: Names it in the error.
            value: Of this process.

        Raises:
            ValueError: process 0 has another value.
        """
        if (first := self.share(value)) != value:
            raise ValueError(
                f"{what} differs: process 0 has {first}, process {self.index} has {value}"
            )

    def begin(self) -> None:
        """Start the devices, for which all processes wait for each other.

        Raises:
            ValueError: this process was told another number of processes.
        """
        if (first := self.share(self.count)) != self.count:
            raise ValueError(
                f"the number of processes differs: process 0 was told {first}, "
                f"process {self.index} was told {self.count}"
            )
        jax.devices()

    def finish(self) -> None:
        """Wait until all have come here, and let them go their ways."""
        self._store.meet(f"{self._folder}/finished")
        self.watch.stop()
