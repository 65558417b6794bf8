"""The table of a file's rows: where each begins, how long it is, its checksum, and the order of their keys.

A table is a cache. One that is damaged, or not about the file, is never used, only made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from searchr1.files.checksums import Damage, FileSum, damaged, take_all
from searchr1.files.sealed import read_sealed, write_sealed
from searchr1.files.text_rows import MAX_LINE_BYTES
from searchr1.retrieval.index.file_identity import FileIdentity

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
        raise ValueError(f"{name}.npy is no array ({error})") from error
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
