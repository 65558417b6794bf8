"""Files that appear when they are complete, or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from searchr1.errors import UserError

BATCH_ROWS = 4096


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """A path to write to; it takes the place of `path` when the block ends well, and is deleted otherwise.

    Raises:
        UserError: the folder cannot be written to, or the disk is full.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"--out {path.parent}: cannot write {path.name} ({error.strerror or error})") from error
    finally:
        partial.unlink(missing_ok=True)


def write_rows(path: Path, rows: Iterable[dict[str, Any]], schema: Any) -> None:
    """Write jsonl or parquet, as the name says."""
    with complete_file(path) as partial:
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
    """Write one object, indented."""
    with complete_file(path) as partial:
        partial.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
