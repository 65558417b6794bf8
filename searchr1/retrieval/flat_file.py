"""The file of FAISS' flat index, written in place: what building one in memory would need is a copy of all vectors."""

from __future__ import annotations

import struct

INNER_PRODUCT = 0
UNUSED = 1 << 20
"""FAISS writes this twice where older versions had something."""


def flat_header(rows: int, dimension: int) -> bytes:
    """What stands before the vectors (fp32, row after row) in a file that `faiss.read_index` reads as IndexFlatIP."""
    return struct.pack(
        "<4siqqq?iQ", b"IxFI", dimension, rows, UNUSED, UNUSED, True, INNER_PRODUCT, rows * dimension
    )  # fmt: skip
