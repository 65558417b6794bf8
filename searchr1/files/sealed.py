"""Small JSON files that carry their own checksum, so that a changed bit in them is noticed."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from searchr1.files.atomic import write_text

SEAL = "xxh3"
MAX_BYTES = 64 << 20
"""No such file is larger; a larger one from elsewhere is rejected before it is read."""


def seal(values: Mapping[str, Any]) -> str:
    """Return the checksum of JSON values, however they are laid out in a file."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return str(xxhash.xxh3_128_hexdigest(text.encode("ascii")))


def write_sealed(path: Path, values: Mapping[str, Any]) -> None:
    """Write values with their checksum; the file appears when it is complete.

    Raises:
        OSError: it cannot be written.
    """
    write_text(path, json.dumps({**values, SEAL: seal(values)}, indent=1) + "\n")


def read_sealed(path: Path, unsealed_formats: tuple[int, ...] = ()) -> dict[str, Any]:
    """Return the values of a file that `write_sealed` wrote.

    Args:
        path: the file.
        unsealed_formats: values of `format` that were written without a checksum.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged; the message is a predicate ("is damaged (…)").
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError("is damaged (no object)")
    if SEAL in values or values.get("format") not in unsealed_formats:
        unseal(values)
    return values


def unseal(values: dict[str, Any]) -> None:
    """Take the checksum out of values that were read, and compare it with theirs.

    Raises:
        ValueError: it is missing or another one; the message is a predicate.
    """
    known = values.pop(SEAL, None)
    try:
        same = known == seal(values)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is damaged ({str(error)[:200]})") from error
    if not same:
        raise ValueError("has changed since it was written (it does not fit its own checksum)")


def read_json(path: Path, most_bytes: int = MAX_BYTES) -> Any:
    """Return what a JSON file holds, which a stranger may have written.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or too large to be read at once; the message is a predicate.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("is damaged (no regular file)")
    if found.st_size > most_bytes:
        raise ValueError(f"is damaged (more than {most_bytes >> 20} MiB long)")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is damaged ({str(error)[:200]})") from error
