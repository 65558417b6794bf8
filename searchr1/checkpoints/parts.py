"""Part of a file, read as a file of its own."""

from __future__ import annotations

import io
import os
from typing import IO, Any


class FilePart(io.RawIOBase):
    """Part of a file as a file of its own. (PyTorch's own view cannot seek from its end, which zipfile does.)"""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._number, self._start, self._length = file.fileno(), start, length
        self._position = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move."""
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        return self._position

    def tell(self) -> int:
        """Where the next read starts."""
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as one read of the file does."""
        view = memoryview(buffer)[: max(self._length - self._position, 0)]
        count = os.preadv(self._number, [view], self._start + self._position)
        self._position += count
        return count
