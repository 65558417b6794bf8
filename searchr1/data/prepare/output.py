"""The prepared files: rows as JSON lines or parquet, and statistics."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from searchr1.errors import UserError
from searchr1.files.atomic import atomic_file

BATCH_ROWS = 4096


@contextmanager
def _output(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which takes the place of `path` when the block ends well.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial:
            yield partial
    except OSError as error:
        raise UserError(f"--out {path.parent}: cannot write {path.name} ({error.strerror or error})") from error


def write_rows(path: Path, rows: Iterable[dict[str, Any]], schema: Any) -> None:
    """Write rows as JSON lines or parquet, by the suffix of `path`."""
    with _output(path) as partial:
        if path.suffix == ".parquet":
            _write_parquet(partial, rows, schema)
            return
        with partial.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_parquet(path: Path, rows: Iterable[dict[str, Any]], schema: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetWriter(path, schema) as writer:
        batch: list[dict[str, Any]] = []
        for row in rows:
            batch.append(row)
            if len(batch) == BATCH_ROWS:
                writer.write_table(pa.Table.from_pylist(batch, schema))
                batch = []
        if batch:
            writer.write_table(pa.Table.from_pylist(batch, schema))


def write_json(path: Path, value: Any) -> None:
    """Write one JSON object, indented."""
    with _output(path) as partial:
        partial.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
