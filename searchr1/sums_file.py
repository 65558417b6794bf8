"""A JSON file that names files of its folder with their sums; a sum of its own shows whether it is damaged itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from searchr1.checksums import FileSum, inside
from searchr1.sealed import read_json, unseal, write_sealed

FORMAT = 1
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
    write_sealed(path, {"format": FORMAT, **fields, "files": {name: asdict(known) for name, known in files.items()}})


def read_sums(path: Path) -> SumsFile:
    """Read the file and compare it with its own sum.

    Raises:
        ValueError: it is damaged; says how, as a predicate. LaterFormat, which is one, if it is not.
        OSError: it cannot be read.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise ValueError("is damaged (it names no files)")
    unseal(content)
    version = content.pop("format", None)
    if version != FORMAT:
        raise LaterFormat(f"has format {version}, this searchr1 knows {FORMAT}; update searchr1")
    files = {name: _file_sum(name, known) for name, known in content.pop("files").items()}
    return SumsFile(files, content)


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
