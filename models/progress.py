"""How work that takes long tells its caller how far it is."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, units done, units in all); 0 units in all: unknown."""
