"""Parts of arrays in an Orbax checkpoint, read when they are asked for.

Orbax restores arrays whole, or divided as it knows it: not into heads with padding, or several
arrays side by side. So this asks TensorStore, in which Orbax keeps them as zarr arrays in one OCDBT
store.
"""

from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer.models.errors import CheckpointError


class StoredArray:
    """An array in a checkpoint. Slices of it are NumPy arrays, and nothing else of it is read.

    Attributes:
        shape: Of the whole.
        dtype: NumPy's; for bfloat16 that of ml_dtypes.
    """

    def __init__(self, folder: Path, name: str):
        """Find an array.

        Args:
            folder: Where Orbax wrote.
            name: Of the array.

        Raises:
            CheckpointError: it is missing, or the checkpoint is damaged.
        """
        import tensorstore

        self._what = f"{folder}: weight {name}"
        store = {"driver": "ocdbt", "base": folder.absolute().as_uri() + "/", "path": f"{name}/"}
        try:
            self._array: Any = tensorstore.open(
                {"driver": "zarr", "kvstore": store}, open=True, read=True
            ).result()
        except ValueError as error:
            what = "is missing" if "NOT_FOUND" in str(error) else f"is damaged ({error})"
            raise CheckpointError(f"{self._what} {what}") from None
        self.shape: tuple[int, ...] = self._array.shape
        self.dtype: np.dtype = self._array.dtype.numpy_dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        """Read what NumPy's basic indexing names; whole chunks of the file, and no others.

        Raises:
            CheckpointError: the checkpoint is damaged.
        """
        try:
            return np.asarray(self._array[index].read().result())
        except ValueError as error:
            raise CheckpointError(f"{self._what} is damaged ({error})") from None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of it."""
        del copy  # what is read is new
        return self[...].astype(dtype or self.dtype, copy=False)
