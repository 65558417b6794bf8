"""Passages on disk with random access."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from searchr1.retrieval.rows import Rows
from searchr1.retrieval.searcher import Document

EXPECTED = 'expected {"id": ..., "contents": "\\"Title\\"\\ntext"}'


class Corpus:
    """Rows of `{"id", "contents", "url"?}` in a jsonl, jsonl.gz or parquet file."""

    def __init__(self, path: Path) -> None:
        """Open a corpus. Packed formats are unpacked beside the file, and every row is checked, at the first use.

        Raises:
            UserError: missing, empty, or a row is no passage; names its line.
        """
        self.path = path
        self._rows = Rows(path, "--corpus_path", "passages", _check)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Document:
        """One passage. A row without an id has its number, counted from 0; one without a url has an empty one."""
        document: Document = self._rows[row]
        document.setdefault("id", str(row))
        document.setdefault("url", "")  # RLinf's client fails without it, and Search-R1's corpus has none
        return document

    def contents(self, start: int = 0, stop: int | None = None) -> Iterator[str]:
        """The text of the passages from `start` up to `stop`, in order."""
        for row in range(start, len(self) if stop is None else min(stop, len(self))):
            yield self._rows[row]["contents"]

    def fingerprint(self) -> str:
        """SHA-256 of the file (unpacked, if it was packed)."""
        return self._rows.summary.sha256


def _check(row: Any) -> None:
    if not isinstance(row, dict) or not isinstance(row.get("contents"), str):
        raise ValueError(f"not a passage; {EXPECTED}")
