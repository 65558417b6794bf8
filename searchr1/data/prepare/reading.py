"""Records of a question file, one by one, whatever its format. A bad one is handed on with its line, not raised."""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from searchr1.data.dataset import parse_line
from searchr1.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".json", ".csv", ".tsv")
BATCH_ROWS = 1024
_LIST = re.compile(r'\s*(?:\{\s*(?:"(?!data")[^"]*"\s*:\s*(?:"[^"]*"|[\w.+-]+)\s*,\s*)*"data"\s*:\s*)?\[', re.IGNORECASE)
"""A list of rows, on its own or below `data` (TriviaQA: after a few plain keys)."""

Tell = Callable[[float], None]
"""Told the share of the file that has been read."""


@dataclass(frozen=True, slots=True)
class Record:
    """A row of a file, or what is wrong with it."""

    line: int
    """Line, or row of a parquet file, from 1."""
    row: dict[str, Any] | None
    problem: str = ""


def is_supported(path: Path) -> bool:
    """Whether the name says a format that can be read."""
    return path.name.endswith(SUFFIXES)


def read_records(path: Path, tell: Tell = lambda share: None) -> Iterator[Record]:
    """Every record of a jsonl (also gzipped), json, parquet, csv or tsv file.

    Raises:
        UserError: another format; missing or unreadable; damaged so that the rest cannot be read.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if not is_supported(path):
        raise UserError(f"{path}: expected one of {', '.join(SUFFIXES)}")
    try:
        if path.suffix == ".parquet":
            yield from _parquet(path, tell)
        elif path.suffix in (".csv", ".tsv"):
            yield from _table(path, tell)
        elif path.suffix == ".json":
            yield from _json(path, tell)
        else:
            yield from _jsonl(path, tell)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not readable ({error})") from error
    tell(1.0)


def _jsonl(path: Path, tell: Tell) -> Iterator[Record]:
    size = max(path.stat().st_size, 1)
    with path.open("rb") as raw:
        lines: Iterable[bytes] = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        for line, data in enumerate(lines, start=1):
            if line % BATCH_ROWS == 0:
                tell(raw.tell() / size)
            if not data.strip():
                continue
            try:
                record = Record(line, parse_line(data, first=line == 1))
            except UserError as error:
                record = Record(line, None, str(error))
            yield record


def _parquet(path: Path, tell: Tell) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            line, total = 0, max(file.metadata.num_rows, 1)
            # Contexts may be most of a file, and nobody reads them here.
            wanted = [name for name in file.schema_arrow.names if name not in ("metadata", "context", "paragraphs")]
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=wanted):
                for row in batch.to_pylist():
                    line += 1
                    yield Record(line, row)
                tell(line / total)
    except pa.ArrowException as error:
        raise UserError(f"{path}: not readable as parquet ({error})") from error


def _table(path: Path, tell: Tell) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        try:
            header = next(reader, [])
            before = reader.line_num
            for cells in reader:
                line, before = before + 1, reader.line_num
                if not cells:
                    continue
                if len(cells) == len(header):
                    yield Record(line, dict(zip(header, cells, strict=True)))
                else:
                    yield Record(line, None, f"has {len(cells)} columns, the first line {len(header)}")
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}:{reader.line_num + 1}: not readable ({error})") from error


def _json(path: Path, tell: Tell) -> Iterator[Record]:
    """A list of rows, decoded one at a time; files that hold jsonl under this name are read as such."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
    start = _LIST.match(text)
    if start is None:
        yield from _jsonl(path, tell)
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
            return
        try:
            row, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{line}: not valid JSON ({error})") from error
        if isinstance(row, dict):
            yield Record(line, row)
        else:
            yield Record(line, None, f"expected an object with keys, found {type(row).__name__}")
        line += text.count("\n", place, end)
        place = end
        count += 1
        if count % BATCH_ROWS == 0:
            tell(place / len(text))
