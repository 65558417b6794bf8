"""Rows of a jsonl file by number: their places lie in a memory-mapped file beside it, the text stays on disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from searchr1.errors import UserError
from searchr1.retrieval.unpack import as_jsonl

FORMAT = 1
SCAN_BYTES = 16 << 20
BAR_BYTES = 256 << 20
"""A smaller file is read before anybody would look at a bar."""
FLUSH_ROWS = 1 << 20

Key = Callable[[Any], int | None]
"""Checks a parsed row (KeyError, TypeError, ValueError: it is none) and may give a 64-bit key to find it by."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What `summary.json` says of a file."""

    format: int
    bytes: int
    mtime_ns: int
    rows: int
    sha256: str


class Rows:
    """Random access to the rows of a file. Memory does not grow with the file."""

    def __init__(self, path: Path, flag: str, kind: str, key: Key) -> None:
        """Open a .jsonl, .jsonl.gz or .parquet file. The first time, all of it is read and checked.

        `kind` names the place of the row table ("passages", "pages"); `key` see `Key`.

        Raises:
            UserError: missing, empty, another format, or a row that `key` refuses; names `flag` and the line.
        """
        self.path = path
        self._file = file = as_jsonl(path, flag)
        self._flag, self._kind = flag, kind
        if file.stat().st_size == 0:
            raise UserError(f"{flag} {path}: the file is empty")
        table = self._finished_table() or self._make_table(key)
        self.summary = _read_summary(table)
        self._starts = np.load(table / "starts.npy", mmap_mode="r")
        self._lengths = np.load(table / "lengths.npy", mmap_mode="r")
        keys = table / "keys.npy"
        self._keys = np.load(keys, mmap_mode="r") if keys.exists() else None
        self._order = np.load(table / "order.npy", mmap_mode="r") if keys.exists() else None
        self._descriptor = os.open(file, os.O_RDONLY)

    def __len__(self) -> int:
        return self.summary.rows

    def __getitem__(self, row: int) -> Any:
        """One row, parsed.

        Raises:
            UserError: the file was changed under us.
        """
        line = os.pread(self._descriptor, int(self._lengths[row]), int(self._starts[row]))
        try:
            return parse(line)
        except ValueError as error:
            raise UserError(f"{self._flag} {self.path}: was changed while it was in use; start again") from error

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def with_key(self, key: int) -> list[int]:
        """Numbers of the rows that have this key, in the file's order."""
        if self._keys is None or self._order is None:
            return []
        wanted = np.uint64(key)
        first, last = np.searchsorted(self._keys, wanted, "left"), np.searchsorted(self._keys, wanted, "right")
        return sorted(self._order[first:last].tolist())

    def _places(self) -> list[Path]:
        """Beside the file, or in the user's cache where that folder cannot be written."""
        digest = hashlib.sha256(str(self._file.resolve()).encode()).hexdigest()[:16]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "searchr1" / "rows" / digest
        return [self._file.with_name(f"{self._file.name}.{self._kind}"), cache / self._kind]

    def _finished_table(self) -> Path | None:
        stat = self._file.stat()
        for table in self._places():
            try:
                summary = _read_summary(table)
            except (OSError, ValueError, TypeError):
                continue
            if (summary.format, summary.bytes, summary.mtime_ns) == (FORMAT, stat.st_size, stat.st_mtime_ns):
                return table
        return None

    def _make_table(self, key: Key) -> Path:
        problem: OSError | None = None
        for table in self._places():
            partial = table.with_name(f"{table.name}.{os.getpid()}.partial")
            try:
                partial.mkdir(parents=True)
                self._scan(partial, key)
                if self._finished_table() is None:  # else another process was faster
                    shutil.rmtree(table, ignore_errors=True)
                    os.replace(partial, table)
                return table
            except OSError as error:
                problem = problem or error
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        finished = self._finished_table()  # another process may have been faster
        if finished is None:
            raise UserError(
                f"{self._flag} {self.path}: cannot write the table of its rows ({problem}); make room"
            ) from problem
        return finished

    def _scan(self, table: Path, key: Key) -> None:
        """Read the file once: places, keys, hash, and a check of every row."""
        stat = self._file.stat()
        digest = hashlib.sha256()
        starts, lengths, keys = _Column(np.int64), _Column(np.uint32), _Column(np.uint64)
        for number, start, line in _lines(self._file, digest.update, f"reading {self.path.name}, once"):
            if not line.strip():
                continue
            try:
                found = key(parse(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{self._flag} {self.path}: line {number}: {_reason(error)}") from error
            starts.add(start)
            lengths.add(len(line))
            if found is not None:
                keys.add(found)
        if not len(starts):
            raise UserError(f"{self._flag} {self.path}: the file has no rows")
        np.save(table / "starts.npy", starts.array())
        np.save(table / "lengths.npy", lengths.array())
        if len(keys):
            order = np.argsort(keys.array(), kind="stable")
            np.save(table / "keys.npy", keys.array()[order])
            np.save(table / "order.npy", order)
        summary = Summary(FORMAT, stat.st_size, stat.st_mtime_ns, len(starts), digest.hexdigest())
        (table / "summary.json").write_text(json.dumps(asdict(summary)) + "\n")


class _Column:
    """A growing array: Python numbers are only kept for the latest rows."""

    def __init__(self, dtype: npt.DTypeLike) -> None:
        self._dtype = dtype
        self._blocks: list[npt.NDArray[Any]] = []
        self._latest: list[int] = []

    def __len__(self) -> int:
        return sum(map(len, self._blocks)) + len(self._latest)

    def add(self, value: int) -> None:
        """Append one value."""
        self._latest.append(value)
        if len(self._latest) == FLUSH_ROWS:
            self._flush()

    def array(self) -> npt.NDArray[Any]:
        """All values."""
        self._flush()
        self._blocks = [np.concatenate(self._blocks)] if self._blocks else [np.empty(0, self._dtype)]
        return self._blocks[0]

    def _flush(self) -> None:
        if self._latest:
            self._blocks.append(np.array(self._latest, self._dtype))
            self._latest = []


def parse(line: bytes) -> Any:
    """One row.

    Raises:
        ValueError: no JSON.
    """
    import orjson

    try:
        return orjson.loads(line)
    except ValueError:
        return json.loads(line)  # half surrogate pairs and NaN, which orjson refuses


def _lines(path: Path, update: Callable[[bytes], object], what: str) -> Iterator[tuple[int, int, bytes]]:
    """(line number from 1, offset, line without its end) of a file; every byte goes through `update` once."""
    size = path.stat().st_size
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with path.open("rb") as file, Progress(*columns, disable=size < BAR_BYTES) as progress:
        task = progress.add_task(what, total=size)
        number, start, rest = 0, 0, b""
        while block := file.read(SCAN_BYTES):
            update(block)
            progress.advance(task, len(block))
            *whole, rest = (rest + block).split(b"\n")
            for line in whole:
                number += 1
                yield number, start, line
                start += len(line) + 1
        if rest:
            yield number + 1, start, rest


def _read_summary(table: Path) -> Summary:
    return Summary(**json.loads((table / "summary.json").read_text()))


def _reason(error: Exception) -> str:
    return f"no {error.args[0]!r}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
