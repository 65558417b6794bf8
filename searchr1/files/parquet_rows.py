"""Rows of a parquet file, one at a time: memory does not grow with the file, and a damaged one is named."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

BATCH_ROWS = 1024
TOGETHER_BYTES = 64 << 20
"""Texts that are made of a batch at once, if all were as long as its longest."""
BUFFER_BYTES = 1 << 20


def parquet_rows(path: Path, leave_out: Collection[str] = ()) -> Iterator[tuple[dict[str, Any], float]]:
    """Yield each row, and the share of the file that has been read. Checksums of pages are verified where there are any.

    Texts are kept as the file's dictionaries while they are read, so that a small file cannot take much memory by
    repeating a long one.

    Raises:
        ValueError: the file is damaged, or no parquet; the message is one line.
        OSError: it cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    options: dict[str, Any] = {"buffer_size": BUFFER_BYTES, "page_checksum_verification": True}
    count = 0
    try:
        with pq.ParquetFile(path, **options) as file:
            twice = next((name for name, times in Counter(file.schema_arrow.names).items() if times > 1), None)
            if twice is not None:
                raise ValueError(f"two columns have the name {twice!r}")
            wanted = [name for name in file.schema_arrow.names if name not in leave_out]
            texts = [field.name for field in file.schema_arrow if pa.types.is_string(field.type)]
            total = file.metadata.num_rows
        with pq.ParquetFile(path, read_dictionary=texts, **options) as file:
            _check_footer(file.metadata, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=wanted):
                for row in _rows_of(batch):
                    count += 1
                    yield row, min(count / max(total, 1), 1.0)
    except (pa.ArrowException, OverflowError, LookupError, TypeError, UnicodeDecodeError) as error:
        place = f" after row {count}" if count else ""
        raise ValueError(f"damaged, or no parquet{place}: {str(error).partition(chr(10))[0]}") from error
    if wanted and count != total:
        raise ValueError(f"damaged: has {count} rows, and {total} in its footer")


def _rows_of(batch: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a batch; together where their texts are short, else each on its own."""
    import pyarrow as pa
    import pyarrow.compute as pc

    named = dict(zip(batch.schema.names, batch.columns, strict=True))
    texts = {name for name, column in named.items() if pa.types.is_dictionary(column.type)}
    longest = sum(pc.max(pc.binary_length(named[name].dictionary)).as_py() or 0 for name in texts)
    size = max(1, min(batch.num_rows, TOGETHER_BYTES // max(longest, 1)))
    for first in range(0, batch.num_rows, size):
        part = {name: column.slice(first, size) for name, column in named.items()}
        plain = {name: column.dictionary_decode() if name in texts else column for name, column in part.items()}
        yield from pa.RecordBatch.from_pydict(plain).to_pylist()


def _check_footer(metadata: Any, names: list[str]) -> None:
    """Check that the parts of a file's own description agree: nothing but this shows that its end is damaged.

    Statistics are not looked at: pyarrow ends the process on damaged ones.

    Raises:
        ValueError: it does not agree.
    """
    import pyarrow as pa

    rows = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows:
        raise ValueError("damaged: its numbers of rows contradict each other")
    written = (metadata.metadata or {}).get(b"ARROW:schema")
    if written is not None:
        schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(written)))
        twice = next((pair for pair in zip(schema.names, names, strict=False) if pair[0] != pair[1]), None)
        if twice is not None:
            raise ValueError(f"damaged: a column is named {twice[1]!r}, and {twice[0]!r} in its schema")
