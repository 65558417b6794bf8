"""Small JSON files that carry their own checksum: a flipped bit in them is noticed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from searchr1.text_rows import parse_json

SEAL = "checksum"
MAX_BYTES = 16 << 20


def write_sealed(path: Path, values: Mapping[str, Any]) -> None:
    """Write values; the file appears when it is complete.

    Raises:
        OSError: it cannot be written.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps({**values, SEAL: _seal(values)}) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_sealed(path: Path, unsealed: tuple[int, ...] = ()) -> dict[str, Any]:
    """Return the values of a file; the `unsealed` formats were written without a checksum.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"has more than {MAX_BYTES >> 20} MiB")
    values = parse_json(data.decode("utf-8"))
    if not isinstance(values, dict):
        raise ValueError("is no object")
    known = values.pop(SEAL, None)
    if known != _seal(values) and not (known is None and values.get("format") in unsealed):
        raise ValueError("its checksum is wrong")
    return values


def _seal(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True)
    return xxhash.xxh3_64_hexdigest(text.encode())
