"""A JSON file that names files of its folder with their sums; a sum of its own shows whether it is damaged itself."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from searchr1.checksums import FileSum, inside

FORMAT = 1
MAX_BYTES = 64 << 20
"""No such file is larger; a stranger's is refused before it is read."""
_XXH3 = re.compile(r"[0-9a-f]{32}")


class LaterFormat(ValueError):
    """The file is whole, but a later release wrote it."""


@dataclass(frozen=True, slots=True)
class SumsFile:
    """The contents of such a file."""

    files: dict[str, FileSum]
    """By path, relative to the folder."""
    fields: dict[str, Any]
    """What the writer added."""


def write_sums(path: Path, files: Mapping[str, FileSum], **fields: Any) -> None:
    """Write the file, which appears when it is complete.

    Raises:
        OSError: it cannot be written.
    """
    content = {"format": FORMAT, **fields, "files": {name: asdict(known) for name, known in files.items()}}
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content | {"xxh3": _own_sum(content)}, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_sums(path: Path) -> SumsFile:
    """Read the file and compare it with its own sum.

    Raises:
        ValueError: it is damaged; says how, as a predicate. LaterFormat, which is one, if it is not.
        OSError: it cannot be read.
    """
    content = read_json(path)
    try:
        if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
            raise ValueError("it names no files")
        own = content.pop("xxh3", None)
        same = own == _own_sum(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is damaged ({str(error)[:200]})") from error
    if not same:
        raise ValueError("has changed since it was written (it does not fit its own checksum)")
    version = content.pop("format", None)
    if version != FORMAT:
        raise LaterFormat(f"has format {version}, this searchr1 knows {FORMAT}; update searchr1")
    files = {name: _file_sum(name, known) for name, known in content.pop("files").items()}
    return SumsFile(files, content)


def read_json(path: Path, most_bytes: int = MAX_BYTES) -> Any:
    """Return what a JSON file holds, which a stranger may have written.

    Raises:
        ValueError: it is damaged, or nothing to be read at once; says how, as a predicate.
        OSError: it cannot be read.
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


def _own_sum(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode("ascii"))


def _file_sum(name: str, known: Any) -> FileSum:
    """Return one entry.

    Raises:
        ValueError: it is none, which a sum that fits does not exclude: anyone can compute one.
    """
    try:
        inside(Path(), name)
    except ValueError as error:
        raise ValueError(f"is damaged ({error})") from error
    if not isinstance(known, dict) or known.keys() != {"bytes", "xxh3"}:
        raise ValueError(f"is damaged (no size and checksum of {name!r})")
    size, xxh3 = known["bytes"], known["xxh3"]
    if type(size) is not int or size < 0 or not isinstance(xxh3, str) or not _XXH3.fullmatch(xxh3):
        raise ValueError(f"is damaged (size {size!r} and checksum {xxh3!r} of {name!r})")
    return FileSum(size, xxh3)
