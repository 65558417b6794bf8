"""Rows of a file by number: a memory-mapped table of their places lies beside it, the text stays on disk."""

from __future__ import annotations

import os
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from searchr1 import caches
from searchr1.errors import UserError
from searchr1.files.atomic import atomic_folder
from searchr1.files.checksums import Damage, FileSum, damaged, read_sealed, take_all, write_sealed
from searchr1.files.text_rows import (
    MAX_LINE_BYTES,
    LineTooLong,
    not_utf8,
    other_encoding,
    parse_json,
    require_shallow,
    split_lines,
)
from searchr1.progress import ProgressBar
from searchr1.retrieval.index.file_identity import BAR_BYTES, FileIdentity, confirm_contents, identity_of
from searchr1.retrieval.index.unpack import as_jsonl

FORMAT = 3
SUMMARY = "summary.json"
COLUMNS: dict[str, type] = {"starts": np.int64, "lengths": np.uint32, "sums": np.uint32}
KEY_COLUMNS: dict[str, type] = {"keys": np.uint64, "order": np.int64}
"""Both or neither."""
CHECKED_ROWS = 1 << 20
FLUSH_ROWS = 1 << 20

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Summary:
    """The contents of `summary.json`."""

    rows: int
    file: FileIdentity
    """The file that the table is of."""
    counts: dict[str, int]
    """Peculiarities of rows, and how many rows have each."""
    files: dict[str, FileSum]
    """The files of the table."""
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class Table:
    """An open table; its columns are mapped."""

    folder: Path
    summary: Summary
    starts: Array
    lengths: Array
    sums: Array
    """CRC-32 of each row's bytes."""
    keys: Array | None
    """Ascending."""
    order: Array | None
    """The row of each key."""


class Column:
    """A growing array: Python numbers are only kept for the latest rows."""

    def __init__(self, dtype: npt.DTypeLike) -> None:
        self._dtype = dtype
        self._blocks: list[Array] = []
        self._latest: list[int] = []

    def __len__(self) -> int:
        return sum(map(len, self._blocks)) + len(self._latest)

    def add(self, value: int) -> None:
        """Append one value."""
        self._latest.append(value)
        if len(self._latest) == FLUSH_ROWS:
            self._flush()

    def array(self) -> Array:
        """Return all values."""
        self._flush()
        self._blocks = [np.concatenate(self._blocks)] if self._blocks else [np.empty(0, self._dtype)]
        return self._blocks[0]

    def _flush(self) -> None:
        if self._latest:
            self._blocks.append(np.array(self._latest, self._dtype))
            self._latest = []


def write_table(folder: Path, columns: dict[str, Array], file: FileIdentity, counts: dict[str, int]) -> Summary:
    """Write a table into an empty folder.

    Raises:
        OSError: it cannot be written.
    """
    for name, values in columns.items():
        np.save(folder / f"{name}.npy", values)
    summary = Summary(len(columns["starts"]), file, counts, take_all(folder))
    write_summary(folder, summary)
    return summary


def write_summary(folder: Path, summary: Summary) -> None:
    """Write the summary of a table.

    Raises:
        OSError: it cannot be written.
    """
    values = asdict(summary)
    write_sealed(folder / SUMMARY, {"rows": values.pop("rows"), "stamp": values.pop("file"), **values})


def read_summary(folder: Path) -> Summary:
    """Read the summary of a table.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or of another version.
    """
    values = read_sealed(folder / SUMMARY, unsealed_formats=(1, 2))
    if values.get("format") != FORMAT:
        raise ValueError(f"is of another version of this program (format {values.get('format')!r}, not {FORMAT})")
    try:
        file = FileIdentity(**values["stamp"])
        files = {str(name): FileSum(int(known["bytes"]), str(known["xxh3"])) for name, known in values["files"].items()}
        counts = {str(what): int(count) for what, count in values["counts"].items()}
        return Summary(int(values["rows"]), file, counts, files)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"is not a table's {SUMMARY} ({error!r})") from error


def table_damage(folder: Path, advance: Callable[[int], object] | None = None) -> Iterator[Damage]:
    """Yield what has changed in a table since it was written."""
    try:
        summary = read_summary(folder)
    except (OSError, ValueError) as error:
        yield Damage(folder / SUMMARY, f"cannot be used: {error}")
        return
    try:
        yield from damaged(folder, summary.files, advance=advance)
    except ValueError as error:
        yield Damage(folder / SUMMARY, f"cannot be used: {error}")


def open_table(folder: Path, summary: Summary, size: int) -> Table:
    """Open a table of a file of `size` bytes; checksums and structure are checked before anything is used.

    Raises:
        OSError, ValueError: it is damaged.
    """
    for damage in damaged(folder, summary.files):
        raise ValueError(f"{damage.path.name} {damage.problem}")
    arrays = {
        name: _load(folder, name, dtype, summary.rows)
        for name, dtype in (COLUMNS | KEY_COLUMNS).items()
        if name in COLUMNS or f"{name}.npy" in summary.files
    }
    if set(summary.files) != {f"{name}.npy" for name in arrays}:
        raise ValueError("its columns are not those of a table")
    table = Table(
        folder, summary, arrays["starts"], arrays["lengths"], arrays["sums"], arrays.get("keys"), arrays.get("order")
    )
    _check_places(table, size)
    _check_keys(table)
    return table


def _load(folder: Path, name: str, dtype: type, rows: int) -> Array:
    try:
        column = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    except (EOFError, SyntaxError, TypeError, OverflowError) as error:  # what numpy lets through of damaged headers
        raise ValueError(f"{name}.npy is not an array ({error})") from error
    if not isinstance(column, np.ndarray) or column.dtype != dtype or column.shape != (rows,):
        raise ValueError(f"{name}.npy is not a column of {rows} numbers")
    return column


def _check_places(table: Table, size: int) -> None:
    """Check that rows follow each other inside the file; a part of them at a time, as they are mapped."""
    if table.summary.rows < 1:
        raise ValueError("has no rows")
    end = 0
    for first in range(0, table.summary.rows, CHECKED_ROWS):
        starts = table.starts[first : first + CHECKED_ROWS]
        lengths = table.lengths[first : first + CHECKED_ROWS].astype(np.int64)
        ends = starts + lengths
        outside = starts.max() > size or ends[-1] > size or lengths.max() > MAX_LINE_BYTES
        if outside or starts[0] < end or (starts[1:] < ends[:-1]).any():
            raise ValueError("its rows do not follow each other inside the file")
        end = int(ends[-1])


def _check_keys(table: Table) -> None:
    keys, order = table.keys, table.order
    if (keys is None) != (order is None):
        raise ValueError("its columns are not those of a table")
    if keys is None or order is None:
        return
    if (keys[1:] < keys[:-1]).any():
        raise ValueError("its keys are not in order")
    seen = np.zeros(len(order), dtype=bool)
    if order.min() < 0 or order.max() >= len(order):
        raise ValueError("its order names rows that there are not")
    seen[order] = True
    if not seen.all():
        raise ValueError("its order leaves rows out")


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
