"""Rows of a jsonl file by number: their places lie in a memory-mapped table beside it, the text stays on disk."""

from __future__ import annotations

import os
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from searchr1 import caches
from searchr1.errors import UserError
from searchr1.files.atomic import atomic_folder
from searchr1.files.text_rows import LineTooLong, not_utf8, other_encoding, parse_json, require_shallow, split_lines
from searchr1.progress import ProgressBar
from searchr1.retrieval.index.file_identity import BAR_BYTES, confirm_contents, identity_of
from searchr1.retrieval.index.row_table import (
    COLUMNS,
    Column,
    Summary,
    Table,
    open_table,
    read_summary,
    write_summary,
    write_table,
)
from searchr1.retrieval.index.unpack import as_jsonl

SCAN_BYTES = 16 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Key = Callable[[Any], int | Sequence[str]]
"""Checks a parsed row (KeyError, TypeError, ValueError: it is none); gives a 64-bit key to find it by, or what to count."""


class _Overtaken(Exception):
    """Another process has finished the same table first."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.table = table


class Rows:
    """Random access to the rows of a file. Memory does not grow with the file."""

    def __init__(self, path: Path, flag: str, kind: str, key: Key) -> None:
        """Open a file that `as_jsonl` reads. The first time, all of it is read and checked.

        `kind` names the place of the row table ("passages", "pages"); `key` see `Key`.

        Raises:
            UserError: missing, empty, another format, or a row that `key` rejects; names `flag` and the line.
        """
        self.path = path
        self._file = file = as_jsonl(path, flag)
        self._flag, self._kind = flag, kind
        if file.stat().st_size == 0:
            raise UserError(f"{flag} {path}: the file is empty")
        self._table = self._finished_table(report=True) or self._make_table(key)
        self._descriptor = os.open(file, os.O_RDONLY)

    @property
    def summary(self) -> Summary:
        """The summary of the file."""
        return self._table.summary

    def __len__(self) -> int:
        return self.summary.rows

    def __getitem__(self, row: int) -> Any:
        """Return one row, parsed.

        Raises:
            UserError: its bytes are not those that were read when the table was made.
        """
        start, length = int(self._table.starts[row]), int(self._table.lengths[row])
        try:
            line = os.pread(self._descriptor, length, start)
            if zlib.crc32(line) == int(self._table.sums[row]):
                return parse(line)
            problem = "its bytes have changed"
        except (OSError, ValueError) as error:
            problem = str(error)
        repair = "restore the file" if self._file == self.path else f"delete {self._file}, which is made again"
        raise UserError(
            f"{self._flag} {self._file}: row {row + 1}, {length} bytes from byte {start} on, is not what it was when the "
            f"file was read ({problem}): it is damaged, or was changed while it was in use; {repair}, and start again"
        )

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def with_key(self, key: int) -> list[int]:
        """Return the numbers of the rows that have this key, in the file's order."""
        keys, order = self._table.keys, self._table.order
        if keys is None or order is None:
            return []
        wanted = np.uint64(key)
        first, last = np.searchsorted(keys, wanted, "left"), np.searchsorted(keys, wanted, "right")
        return sorted(order[first:last].tolist())

    def _places(self) -> list[Path]:
        """Return the places of the table: beside the file, or in the user's cache where that folder cannot be written."""
        return caches.beside_or_cached(self._file, self._kind)

    def _finished_table(self, report: bool = False) -> Table | None:
        """Return a whole table that was made of the file as it is now; `report` prints why one is not used."""
        for folder in self._places():
            if not folder.is_dir():
                continue
            try:
                summary = read_summary(folder)
                current = confirm_contents(self._file, summary.file)
                if current is None:
                    raise ValueError(f"is not of the present contents of {self._file.name}")
                if current != summary.file:
                    summary = replace(summary, file=current)
                    with suppress(OSError):  # not ours to write: it is checked again the next time
                        write_summary(folder, summary)
                return open_table(folder, summary, self._file.stat().st_size)
            except (OSError, ValueError) as error:
                if report:
                    print(f"{folder}: {error}; made again", flush=True)
        return None

    def _make_table(self, key: Key) -> Table:
        problem: OSError | None = None
        for folder in self._places():
            try:
                with atomic_folder(folder, replace=True) as partial:
                    summary = self._scan(partial, key)
                    if (finished := self._finished_table()) is not None:
                        raise _Overtaken(finished)
                return open_table(folder, summary, self._file.stat().st_size)
            except _Overtaken as overtaken:
                return overtaken.table
            except OSError as error:
                problem = problem or error
        finished = self._finished_table()  # another process may have been faster
        if finished is None:
            raise UserError(
                f"{self._flag} {self.path}: cannot write the table of its rows ({problem}); make room, or {caches.HINT}"
            ) from problem
        return finished

    def _scan(self, folder: Path, key: Key) -> Summary:
        """Read the file once: places, keys, hash, and a check of every row."""
        before, read_ns = self._file.stat(), time.time_ns()
        digest = sha256()
        counts: Counter[str] = Counter()
        columns = {name: Column(dtype) for name, dtype in COLUMNS.items()}
        keys = Column(np.uint64)
        with self._file.open("rb") as file:
            encoding = other_encoding(file.read(32))
        if encoding is not None:
            raise UserError(f"{self._flag} {self.path}: line 1: not UTF-8, but {encoding}; save the file as UTF-8")
        try:
            for number, start, line in _lines(self._file, digest.update, f"reading {self.path.name}, once"):
                if not line.strip():
                    continue
                try:
                    keys_or_counts = key(parse(line))
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise UserError(f"{self._flag} {self.path}: line {number}: {_reason(error)}") from error
                columns["starts"].add(start)
                columns["lengths"].add(len(line))
                columns["sums"].add(zlib.crc32(line))
                if isinstance(keys_or_counts, int):
                    keys.add(keys_or_counts)
                else:
                    counts.update(keys_or_counts)
        except LineTooLong as error:
            raise UserError(f"{self._flag} {self.path}: line {error.line}: {error}") from error
        if not len(columns["starts"]):
            raise UserError(f"{self._flag} {self.path}: the file has no rows")
        arrays = {name: column.array() for name, column in columns.items()}
        if len(keys):
            order = np.argsort(keys.array(), kind="stable")
            arrays |= {"keys": keys.array()[order], "order": order}
        made = identity_of(before, digest.hexdigest(), read_ns)
        if identity_of(self._file.stat(), made.sha256, read_ns) != made:
            raise UserError(f"{self._flag} {self.path}: was changed while it was read; start again")
        return write_table(folder, arrays, made, dict(counts))


def parse(line: bytes) -> Any:
    """Parse one row.

    Raises:
        ValueError: no JSON.
    """
    import orjson

    try:
        return require_shallow(orjson.loads(line), line.count(b"[") + line.count(b"{"))
    except orjson.JSONDecodeError:  # also half surrogate pairs and NaN, which are read
        return parse_json(line.removeprefix(BYTE_ORDER_MARK).decode("utf-8", "surrogatepass"))


def _lines(path: Path, update: Callable[[bytes], object], what: str) -> Iterator[tuple[int, int, bytes]]:
    """Yield (line number from 1, offset, line without its end) of a file; every byte goes through `update` once."""
    size = path.stat().st_size
    with path.open("rb") as file, ProgressBar(what, size, least=BAR_BYTES) as bar:

        def read(count: int) -> bytes:
            block = file.read(count)
            update(block)
            bar.advance(len(block))
            return block

        yield from split_lines(read, block_bytes=SCAN_BYTES)


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return not_utf8(error)
    return f"no {error.args[0]!r}" if isinstance(error, KeyError) else str(error)
