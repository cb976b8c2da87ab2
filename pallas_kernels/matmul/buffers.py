"""Arrays of the product's kernel, by name."""

from typing import Any, NamedTuple

import jax


class Buffers(NamedTuple):
    """What one part of the kernel needs; the kernel finds all of it under the same names.

    Attributes:
        inputs: Arrays and references in global memory.
        outputs: What the kernel returns.
        scratch: Shared memory and barriers.
    """

    inputs: dict[str, Any]
    outputs: dict[str, jax.ShapeDtypeStruct]
    scratch: dict[str, Any]
