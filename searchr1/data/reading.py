"""Records of a file of rows, one by one, whatever its format. A bad one is handed on with its line, not raised."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from searchr1.errors import UserError
from searchr1.files.parquet_rows import parquet_rows
from searchr1.files.text_rows import (
    MAX_LINE_BYTES,
    LineTooLong,
    decode,
    json_problem,
    not_utf8,
    other_encoding,
    parse_json,
    require_shallow,
    split_lines,
)

SUFFIXES = (".jsonl", ".ndjson", ".parquet", ".json", ".csv", ".tsv")
"""All but parquet may be gzipped: `.jsonl.gz`."""
BATCH_ROWS = 1024
DELIMITERS = (",", ";", "\t")
UNCLOSED = "; is a quote not closed?"
MAX_JSON_BYTES = 4 << 30
"""A list of rows is read whole."""
USUAL_BYTES, USUAL_RATIO = 64 << 20, 64
"""What a gzipped list may be, unpacked: so much, or so many times its packed size. Text is packed to a tenth, a bomb to a
thousandth."""
CONTENTS = {
    b"PAR1": "a parquet file; name it .parquet",
    b"\x1f\x8b": "gzipped; let its name end in .gz",
    b"PK\x03\x04": "a zip archive or a spreadsheet; save the rows as .csv or .jsonl",
    b"version https://git-lfs": "a Git LFS pointer, not the data; run git lfs pull",
}
"""What files of other formats begin with."""
_LIST = re.compile(r'\s*(?:\{\s*(?:"(?!data")[^"]*"\s*:\s*(?:"[^"]*"|[\w.+-]+)\s*,\s*)*"data"\s*:\s*)?\[', re.IGNORECASE)
"""A list of rows, on its own or below `data` (TriviaQA: after a few plain keys)."""

Update = Callable[[float], object]
"""Told the share of the file that has been read."""


@dataclass(frozen=True, slots=True)
class Record:
    """A row of a file, or what is wrong with it."""

    line: int
    """Line, or row of a parquet file, from 1."""
    row: dict[str, Any] | None
    problem: str = ""


def file_format(name: str) -> str | None:
    """Return the format that a file's name says, one of `SUFFIXES`; None if it says none that is read."""
    name = name.lower().removesuffix(".gz") if not name.lower().endswith(".parquet.gz") else name
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def is_supported(path: Path) -> bool:
    """Return whether the name says a format that can be read."""
    return file_format(path.name) is not None


def bare_name(path: Path) -> str:
    """Return the file's name without its suffixes."""
    found = file_format(path.name)
    return path.name.removesuffix(".gz").removesuffix(found) if found else path.stem


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line (or row) numbers from 1, and rows.

    Raises:
        UserError: missing, empty or unreadable file; a bad line, by its number.
    """
    count = 0
    for count, record in enumerate(read_records(path), start=1):  # noqa: B007
        if record.row is None:
            raise UserError(f"{path}:{record.line}: {record.problem}")
        yield record.line, record.row
    if not count:
        raise UserError(f"{path}: the file has no rows")


def read_records(path: Path, update: Update = lambda share: None, leave_out: Collection[str] = ()) -> Iterator[Record]:
    """Every record of a jsonl, json, csv, tsv (also gzipped) or parquet file.

    Args:
        path: its name says the format.
        update: called with the share that is read.
        leave_out: columns of a parquet file that nobody reads.

    Raises:
        UserError: another format; missing or unreadable; damaged so that the rest cannot be read.
    """
    if path.is_dir():
        raise UserError(f"{path}: no such file, but a folder; name the files in it")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    found = file_format(path.name)
    if found is None:
        raise UserError(f"{path}: expected one of {', '.join(SUFFIXES)} (but for parquet also with .gz)")
    try:
        if found == ".parquet":
            yield from _parquet(path, update, leave_out)
        else:
            with _open(path) as (raw, file):
                read = _table if found in (".csv", ".tsv") else _json if found == ".json" else _jsonl
                yield from read(path, file, _progress(path, raw, update))
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not readable ({error})") from error
    update(1.0)


def parse_line(data: bytes, first: bool = False) -> dict[str, Any]:
    """Return the object on one line of a jsonl file; `first`: a byte order mark may stand before it.

    Raises:
        UserError: not UTF-8, not JSON, or no object.
    """
    try:
        row = parse_json(decode(data, first))
    except ValueError as error:
        raise UserError(str(error)) from error
    if not isinstance(row, dict):
        raise UserError(f"expected an object with keys, found {type(row).__name__}")
    return row


@contextmanager
def _open(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Return the file, and its contents unpacked."""
    with path.open("rb") as raw:
        start = raw.read(32)
        raw.seek(0)
        packed = path.name.lower().endswith(".gz")
        for magic, what in CONTENTS.items():
            if start.startswith(magic) and not (packed and magic == b"\x1f\x8b"):
                raise UserError(f"{path}: is {what}")
        if not packed:
            _require_utf8(path, start)
            yield raw, raw
            return
        with gzip.GzipFile(fileobj=raw) as unpacked:
            _require_utf8(path, unpacked.peek(32))
            yield raw, cast("IO[bytes]", unpacked)


def _require_utf8(path: Path, head: bytes) -> None:
    encoding = other_encoding(head[:32])
    if encoding is not None:
        raise UserError(f"{path}:1: not UTF-8, but {encoding}; save the file as UTF-8")


def _progress(path: Path, raw: IO[bytes], update: Update) -> Callable[[], object]:
    size = max(path.stat().st_size, 1)
    return lambda: update(raw.tell() / size)


def _jsonl(path: Path, file: IO[bytes], progress: Callable[[], object]) -> Iterator[Record]:
    # Bytes, and the text of one line at a time: so that a line that is not UTF-8 can be named.
    for line, data in _lines(path, file):
        if line % BATCH_ROWS == 0:
            progress()
        if not data.strip():
            continue
        try:
            record = Record(line, parse_line(data, first=line == 1))
        except UserError as error:
            record = Record(line, None, str(error))
        yield record


def _parquet(path: Path, update: Update, leave_out: Collection[str]) -> Iterator[Record]:
    line = 0
    try:
        for row, share in parquet_rows(path, leave_out):
            line += 1
            yield Record(line, row)
            if line % BATCH_ROWS == 0:
                update(share)
    except ValueError as error:
        raise UserError(f"{path}: not readable as parquet ({error})") from error


def _table(path: Path, file: IO[bytes], progress: Callable[[], object]) -> Iterator[Record]:
    """Rows below a line of column names; the first line shows what stands between columns."""
    csv.field_size_limit(MAX_LINE_BYTES)
    lines = _TextLines(path, file)
    line = before = 0
    try:
        first = next(lines, "")
        own = "\t" if file_format(path.name) == ".tsv" else ","
        widths = {mark: len(next(csv.reader([first], delimiter=mark), [])) for mark in (own, *DELIMITERS)}
        delimiter = max(widths, key=lambda mark: widths[mark])  # the suffix's own, if no other gives more columns
        reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter)
        header = [name.strip() for name in next(reader, [])]
        twice = next((name for name in header if header.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{path}:1: two columns have the name {twice!r}; give each its own")
        before = reader.line_num
        for cells in reader:
            line, before = before + 1, reader.line_num
            if line % BATCH_ROWS == 0:
                progress()
            if not cells:
                continue
            if lines.ended:  # inside this row
                yield Record(line, None, "has a quote that is not closed: all that follows is inside it; close or double it")
            elif len(cells) == len(header):
                yield Record(line, dict(zip(header, cells, strict=True)))
            else:
                yield Record(line, None, f"has {len(cells)} columns, the first line {len(header)}")
    except csv.Error as error:
        raise UserError(f"{path}:{before + 1}: not readable ({error}{UNCLOSED if 'limit' in str(error) else ''})") from error


def _lines(path: Path, file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield line numbers from 1, and lines without their ends."""
    try:
        for line, _, data in split_lines(file.read):
            yield line, data
    except LineTooLong as error:
        raise UserError(f"{path}:{error.line}: {error}") from error


class _TextLines:
    """Lines as text, with their ends, for the reader of tables."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path = path
        self._lines = _lines(path, file)
        self.ended = False
        """Whether one was asked for after the last: inside a row, since a row ends with a line."""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            line, data = next(self._lines)
            return decode(data, first=line == 1) + "\n"
        except StopIteration:
            self.ended = True
            raise
        except ValueError as error:
            raise UserError(f"{self._path}:{line}: {error}") from error


def _read_whole(path: Path, file: IO[bytes]) -> bytes:
    """Read a whole file, unless it unpacks to far more than its size.

    Raises:
        UserError: it is too large.
    """
    limit = MAX_JSON_BYTES
    if path.name.lower().endswith(".gz"):
        limit = min(limit, max(USUAL_BYTES, USUAL_RATIO * path.stat().st_size))
    data = file.read(limit + 1)
    if len(data) > limit:
        raise UserError(f"{path}: holds more than {limit >> 20} MiB of JSON; save it with one row on each line, as .jsonl")
    return data


def _json(path: Path, file: IO[bytes], progress: Callable[[], object]) -> Iterator[Record]:
    """A list of rows, decoded one at a time; files that hold jsonl under this name are read as such."""
    data = _read_whole(path, file)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: {not_utf8(error)}") from error
    start = _LIST.match(text)
    if start is None:
        yield from _jsonl(path, io.BytesIO(data), progress)
        return
    decoder, blank = json.JSONDecoder(), re.compile(r"[\s,]*")
    place, line = start.end(), 1 + text.count("\n", 0, start.end())
    count = 0
    while True:
        skipped = blank.match(text, place)
        assert skipped is not None  # it matches nothing too
        line += text.count("\n", place, skipped.end())
        place = skipped.end()
        if text[place : place + 1] == "]":
            rest = text[place + 1 :].strip()
            if rest and start[0].lstrip().startswith("["):
                raise UserError(f"{path}:{line}: more follows after the end of the list; write one list of all rows")
            return
        try:
            row, end = decoder.raw_decode(text, place)
            require_shallow(row, text.count("[", place, end) + text.count("{", place, end))
        except (ValueError, RecursionError) as error:
            number = error.lineno if isinstance(error, json.JSONDecodeError) else line
            raise UserError(f"{path}:{number}: {json_problem(error)}") from error
        if isinstance(row, dict):
            yield Record(line, row)
        else:
            yield Record(line, None, f"expected an object with keys, found {type(row).__name__}")
        line += text.count("\n", place, end)
        place = end
        count += 1
        if count % BATCH_ROWS == 0:
            progress()


class Events:
    """Count what a user should see of rows that were read all the same, with the first place of each kind."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, what: str, place: str) -> None:
        """Count one event, said of rows: `have null items among the gold answers`."""
        self._counts[what] += 1
        self._first.setdefault(what, place)

    def sentences(self) -> list[str]:
        """Return a sentence for each kind."""
        return [f"{count:,} rows {what} (the first: {self._first[what]})" for what, count in self._counts.items()]
