"""The safetensors container: 8 bytes of header length, a JSON header, then the numbers.

The `safetensors` package reads bfloat16 through a framework's arrays only, and JAX's would lie on
the accelerator before the weights are converted. Here they stay in the memory-mapped file.
"""

import json
import math
import mmap
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxinfer.models.errors import CheckpointError, UnsupportedModelError

DTYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


class SafetensorsFile:
    """An open file."""

    def __init__(self, path: Path):
        """Read the header and check that every tensor lies within the file.

        Raises:
            CheckpointError: the file is missing, truncated or corrupt.
        """
        self._path = path
        try:
            with path.open("rb") as file:
                if len(file.read(8)) < 8:
                    raise CheckpointError(f"{path}: truncated or corrupt safetensors: no header")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing") from None
        except OSError as error:
            raise CheckpointError(f"{path}: {error}") from error
        length = int.from_bytes(self._map[:8], "little")
        self._base = 8 + length
        try:
            if self._base > len(self._map):
                raise ValueError(f"the header ends at byte {self._base}, the file at "
                                 f"{len(self._map)}")  # fmt: skip
            header = json.loads(self._map[8 : self._base])
            self._entries = {
                name: (entry["dtype"], tuple(map(int, entry["shape"])), *entry["data_offsets"])
                for name, entry in header.items()
                if name != "__metadata__"
            }
            for name, (_, _, start, end) in self._entries.items():
                if not 0 <= start <= end <= len(self._map) - self._base:
                    raise ValueError(f"tensor {name} ends after the last byte")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: truncated or corrupt safetensors: {error}") from error

    def names(self) -> tuple[str, ...]:
        """What the file holds."""
        return tuple(self._entries)

    def read(self, name: str) -> np.ndarray:
        """One tensor, read-only, in its own dtype.

        Raises:
            CheckpointError: it is missing, or its size contradicts its shape.
            UnsupportedModelError: a dtype that is not implemented.
        """
        try:
            kind, shape, start, end = self._entries[name]
        except KeyError:
            raise CheckpointError(f"{self._path}: tensor {name} is missing") from None
        if kind not in DTYPES:
            raise UnsupportedModelError(
                f"{self._path}: tensor {name} has dtype {kind}, which is not supported; "
                f"supported: {', '.join(DTYPES)}"
            )
        dtype, count = np.dtype(DTYPES[kind]), math.prod(shape)
        if end - start != count * dtype.itemsize:
            raise CheckpointError(
                f"{self._path}: corrupt: tensor {name} of shape {shape} has {end - start} bytes"
            )
        # Not np.frombuffer(…, dtype): offsets need not be aligned.
        raw = np.frombuffer(self._map, np.uint8, end - start, self._base + start)
        return raw.view(dtype).reshape(shape)
