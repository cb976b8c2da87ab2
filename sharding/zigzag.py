"""The zigzag sequence 0, 1, -1, 2, -2, … from which the decompositions are built."""

import numpy as np
import numpy.typing as npt


def zigzag(modulus: int) -> npt.NDArray[np.int64]:
    """Order the residues of an even modulus so that neighbours differ by each residue once.

    Example:
        >>> zigzag(6).tolist()
        [0, 1, 5, 2, 4, 3]
    """
    place = np.arange(modulus)
    return np.where(place % 2 == 1, (place + 1) // 2, (-(place // 2)) % modulus)
