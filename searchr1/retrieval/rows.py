"""Rows of a jsonl file by number: their places lie in a memory-mapped file beside it, the text stays on disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from searchr1.errors import UserError
from searchr1.retrieval.stamp import BAR_BYTES, Stamp, confirm, stamp
from searchr1.retrieval.unpack import as_jsonl

FORMAT = 2
SCAN_BYTES = 16 << 20
FLUSH_ROWS = 1 << 20

Key = Callable[[Any], int | Sequence[str]]
"""Checks a parsed row (KeyError, TypeError, ValueError: it is none); gives a 64-bit key to find it by, or what to count."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What `summary.json` says of a file."""

    format: int
    rows: int
    stamp: Stamp
    counts: dict[str, int]
    """What is peculiar about rows, and how many are so."""


class Rows:
    """Random access to the rows of a file. Memory does not grow with the file."""

    def __init__(self, path: Path, flag: str, kind: str, key: Key) -> None:
        """Open a file that `as_jsonl` reads. The first time, all of it is read and checked.

        `kind` names the place of the row table ("passages", "pages"); `key` see `Key`.

        Raises:
            UserError: missing, empty, another format, or a row that `key` refuses; names `flag` and the line.
        """
        self.path = path
        self._file = file = as_jsonl(path, flag)
        self._flag, self._kind = flag, kind
        if file.stat().st_size == 0:
            raise UserError(f"{flag} {path}: the file is empty")
        table, self.summary = self._finished_table(report=True) or self._make_table(key)
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

    def _finished_table(self, report: bool = False) -> tuple[Path, Summary] | None:
        """Return a table that was made of the file as it is now; `report` prints why one is not used."""
        for table in self._places():
            if not table.is_dir():
                continue
            try:
                summary = _read_summary(table)
            except (OSError, ValueError, TypeError, KeyError):
                summary = None
            current = confirm(self._file, summary.stamp) if summary and summary.format == FORMAT else None
            if summary is None or current is None:
                if report:
                    print(f"{table}: is not of the present contents of {self._file.name}; made again", flush=True)
                continue
            if current != summary.stamp:
                summary = replace(summary, stamp=current)
                with suppress(OSError):  # not ours to write: it is checked again the next time
                    _write_summary(table, summary)
            return table, summary
        return None

    def _make_table(self, key: Key) -> tuple[Path, Summary]:
        problem: OSError | None = None
        for table in self._places():
            partial = table.with_name(f"{table.name}.{os.getpid()}.partial")
            try:
                partial.mkdir(parents=True)
                summary = self._scan(partial, key)
                if (finished := self._finished_table()) is not None:  # another process was faster
                    return finished
                shutil.rmtree(table, ignore_errors=True)
                os.replace(partial, table)
                return table, summary
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

    def _scan(self, table: Path, key: Key) -> Summary:
        """Read the file once: places, keys, hash, and a check of every row."""
        before, read_ns = self._file.stat(), time.time_ns()
        digest = hashlib.sha256()
        counts: Counter[str] = Counter()
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
            if isinstance(found, int):
                keys.add(found)
            else:
                counts.update(found)
        if not len(starts):
            raise UserError(f"{self._flag} {self.path}: the file has no rows")
        np.save(table / "starts.npy", starts.array())
        np.save(table / "lengths.npy", lengths.array())
        if len(keys):
            order = np.argsort(keys.array(), kind="stable")
            np.save(table / "keys.npy", keys.array()[order])
            np.save(table / "order.npy", order)
        made = stamp(before, digest.hexdigest(), read_ns)
        if stamp(self._file.stat(), made.sha256, read_ns) != made:
            raise UserError(f"{self._flag} {self.path}: was changed while it was read; start again")
        summary = Summary(FORMAT, len(starts), made, dict(counts))
        _write_summary(table, summary)
        return summary


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
    values = json.loads((table / "summary.json").read_text(encoding="utf-8"))
    return Summary(**values | {"stamp": Stamp(**values["stamp"])})


def _write_summary(table: Path, summary: Summary) -> None:
    partial = table / f"summary.{os.getpid()}.partial"
    partial.write_text(json.dumps(asdict(summary), ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, table / "summary.json")


def _reason(error: Exception) -> str:
    return f"no {error.args[0]!r}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
