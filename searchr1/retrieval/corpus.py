"""Passages on disk with random access: memory holds one offset per passage, never the text."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from searchr1.errors import UserError

Document = dict[str, Any]


class Corpus:
    """A jsonl file of `{"id", "contents", "url"?}` rows."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"--corpus_path {path}: no such file")
        if path.suffix != ".jsonl":
            raise UserError(f"--corpus_path {path}: expected an unpacked .jsonl file")
        if path.stat().st_size == 0:
            raise UserError(f"--corpus_path {path}: the file is empty")
        self.path = path
        self._file = path.open("rb")
        self._data = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._offsets = _line_offsets(self._data)
        if not len(self._offsets):
            raise UserError(f"--corpus_path {path}: the file has no rows")
        self[0]  # a wrong format is told at the start, not at the first search

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, row: int) -> Document:
        start = int(self._offsets[row])
        end = self._data.find(b"\n", start)
        line = self._data[start : end if end >= 0 else len(self._data)]
        try:
            document = json.loads(line)
            if not isinstance(document["contents"], str):
                raise TypeError("contents is not text")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path}: row {row + 1} is no passage ({type(error).__name__}: {error}); expected "
                '{"id": ..., "contents": "\\"Title\\"\\ntext"}'
            ) from error
        document.setdefault("id", str(row))
        return dict(document)

    def contents(self) -> Iterator[str]:
        """The text of every passage, in order."""
        for row in range(len(self)):
            yield self[row]["contents"]

    def fingerprint(self) -> str:
        """Changes when the file does: its size, its first and its last mebibyte."""
        size = len(self._data)
        digest = hashlib.sha256(str(size).encode())
        digest.update(self._data[: 1 << 20])
        digest.update(self._data[max(0, size - (1 << 20)) :])
        return digest.hexdigest()[:32]


def _line_offsets(data: mmap.mmap) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Start of every line that is not blank."""
    offsets = []
    position, size = 0, len(data)
    while position < size:
        end = data.find(b"\n", position)
        end = size if end < 0 else end
        if data[position:end].strip():
            offsets.append(position)
        position = end + 1
    return np.array(offsets, dtype=np.int64)
