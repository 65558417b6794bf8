"""Passages on disk with random access: memory holds one offset per passage, never the text."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from searchr1.errors import UserError
from searchr1.retrieval.unpack import as_jsonl

Document = dict[str, Any]

SCAN_BYTES = 64 << 20
SHORT_LINE = 64
"""A line that could be blank is shorter than this."""
HASH_BLOCKS = 256
HASH_BLOCK_BYTES = 1 << 16


class Corpus:
    """Rows of `{"id", "contents", "url"?}` in a jsonl, jsonl.gz or parquet file."""

    def __init__(self, path: Path) -> None:
        """Open a corpus; packed formats are unpacked beside the file at the first use.

        Raises:
            UserError: missing, empty, or its first row is no passage.
        """
        self.path = path
        file = as_jsonl(path, "--corpus_path")
        if file.stat().st_size == 0:
            raise UserError(f"--corpus_path {path}: the file is empty")
        with file.open("rb") as opened:
            self._data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        self._offsets = line_offsets(self._data)
        if not len(self._offsets):
            raise UserError(f"--corpus_path {path}: the file has no rows")
        self[0]  # a wrong format is told at the start, not at the first search

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, row: int) -> Document:
        """One passage.

        Raises:
            UserError: the row is no passage; names its line.
        """
        start = int(self._offsets[row])
        try:
            document = json.loads(line_at(self._data, start))
            if not isinstance(document["contents"], str):
                raise TypeError("contents is not text")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path}: line {_line_number(self._data, start)} is no passage ({type(error).__name__}: {error}); "
                'expected {"id": ..., "contents": "\\"Title\\"\\ntext"}'
            ) from error
        document.setdefault("id", str(row))
        return dict(document)

    def contents(self) -> Iterator[str]:
        """The text of every passage, in order."""
        for row in range(len(self)):
            yield self[row]["contents"]

    def fingerprint(self) -> str:
        """SHA-256 of the size and of 256 evenly spaced blocks: all of a file below 16 MiB, a sample of a larger one.

        Reading all of a 14 GB corpus would cost every start of a server a minute.
        """
        size = len(self._data)
        digest = hashlib.sha256(str(size).encode())
        step = max(size // HASH_BLOCKS, HASH_BLOCK_BYTES)
        for start in range(0, size, step):
            digest.update(self._data[start : start + HASH_BLOCK_BYTES])
        digest.update(self._data[max(size - HASH_BLOCK_BYTES, 0) :])
        return digest.hexdigest()[:32]


def line_at(data: mmap.mmap, start: int) -> bytes:
    """The line that starts there, without its end."""
    end = data.find(b"\n", start)
    return data[start : end if end >= 0 else len(data)]


def line_offsets(data: mmap.mmap) -> npt.NDArray[np.int64]:
    """Start of every line that is not blank."""
    ends = [np.empty(0, dtype=np.int64)]
    for start in range(0, len(data), SCAN_BYTES):
        block = np.frombuffer(data[start : start + SCAN_BYTES], dtype=np.uint8)
        ends.append(np.flatnonzero(block == ord("\n")) + start)
    line_ends = np.concatenate([*ends, [len(data)]])
    starts = np.concatenate([[0], line_ends[:-1] + 1])
    lengths = line_ends - starts
    keep = lengths > 0
    for line in np.flatnonzero(keep & (lengths < SHORT_LINE)):
        keep[line] = bool(data[starts[line] : line_ends[line]].strip())
    return starts[keep].astype(np.int64)


def _line_number(data: mmap.mmap, start: int) -> int:
    """Counted from 1, blank lines too."""
    blocks = range(0, start, SCAN_BYTES)
    return 1 + sum(data[block : min(block + SCAN_BYTES, start)].count(b"\n") for block in blocks)
