"""Packed corpora and pages as plain jsonl: rows are then read in place, whatever the file was."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path

from searchr1.errors import UserError

COPY_BYTES = 16 << 20


def as_jsonl(path: Path, flag: str) -> Path:
    """`path` if it is a jsonl file; else a jsonl file beside it, written at the first use or when `path` has changed.

    Raises:
        UserError: missing, another format, damaged, or no room for the unpacked file; names `flag`.
    """
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file")
    if path.name.endswith(".jsonl"):
        return path
    if not path.name.endswith((".jsonl.gz", ".parquet")):
        raise UserError(f"{flag} {path}: expected a .jsonl, .jsonl.gz or .parquet file")
    unpacked = path.with_name(f"{path.name}.unpacked.jsonl")
    if unpacked.exists() and unpacked.stat().st_mtime >= path.stat().st_mtime:
        return unpacked
    print(f"{path}: unpacking into {unpacked.name}, once", flush=True)
    partial = unpacked.with_name(f"{unpacked.name}.{os.getpid()}.partial")
    try:
        (_gunzip if path.suffix == ".gz" else _write_rows)(path, partial)
        os.replace(partial, unpacked)
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{flag} {path}: cannot unpack it into {unpacked} ({type(error).__name__}: {error})") from error
    finally:
        partial.unlink(missing_ok=True)
    return unpacked


def _gunzip(path: Path, output: Path) -> None:
    with gzip.open(path) as source, output.open("wb") as target:
        shutil.copyfileobj(source, target, COPY_BYTES)


def _write_rows(path: Path, output: Path) -> None:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as table, output.open("w", encoding="utf-8") as target:
        for batch in table.iter_batches(batch_size=4096):
            for row in batch.to_pylist():
                target.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
