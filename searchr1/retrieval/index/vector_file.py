"""A file of vectors and nothing else: rows x dimension numbers, in a format that its name ends with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from searchr1.retrieval.index.manifest import DamagedIndex, refused

DTYPES = {".f16": np.float16, ".f32": np.float32}


def check_vectors(path: Path, rows: int, dimension: int) -> None:
    """Check the size of a file of vectors.

    Raises:
        DamagedIndex: it is another, or the name says no number format.
    """
    if path.suffix not in DTYPES:
        raise DamagedIndex(path, f"is no file of vectors ({' or '.join(DTYPES)})")
    size = path.stat().st_size if path.is_file() else 0
    if size != (wanted := rows * dimension * np.dtype(DTYPES[path.suffix]).itemsize):
        raise DamagedIndex(path, f"has {size} bytes instead of {wanted}")


def open_vectors(path: Path, rows: int, dimension: int) -> npt.NDArray[Any]:
    """[rows, dimension] vectors, mapped.

    Raises:
        UserError: missing, or of another size.
    """
    try:
        check_vectors(path, rows, dimension)
    except DamagedIndex as error:
        raise refused(error) from error
    return np.memmap(path, dtype=DTYPES[path.suffix], mode="r", shape=(rows, dimension))
