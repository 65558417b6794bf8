"""Checksums of the files in a folder, and what has changed since they were taken.

XXH3 (128 bits) notices damage, at the speed of memory. It is no protection against someone who changes a file and its
checksum: what keeps a stranger's file from doing harm is how it is read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

BLOCK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class FileSum:
    """Size and checksum of a file."""

    bytes: int
    xxh3: str
    """32 hexadecimal digits; empty for a file whose size alone is known."""


@dataclass(frozen=True, slots=True)
class Damage:
    """A file that is not what it was."""

    path: Path
    problem: str
    """What is wrong, as a predicate: "is missing", "has 10 bytes instead of 12"."""

    def __str__(self) -> str:
        return f"{self.path} {self.problem}"


def checksum(path: Path, advance: Callable[[int], object] | None = None) -> str:
    """Return the checksum of a file as 32 hexadecimal digits; `advance` is called with the bytes of every block.

    Raises:
        OSError: the file cannot be read.
    """
    digest = xxhash.xxh3_128()
    block = bytearray(BLOCK_BYTES)
    view = memoryview(block)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(view[:count])
            if advance is not None:
                advance(count)
    return digest.hexdigest()


def take(path: Path, advance: Callable[[int], object] | None = None) -> FileSum:
    """Return the size and the checksum of a file.

    Raises:
        OSError: the file cannot be read.
    """
    return FileSum(path.stat().st_size, checksum(path, advance))


def files_below(folder: Path) -> Iterator[Path]:
    """Yield the paths of all files below a folder, relative to it, in order. Symbolic links to folders are not followed."""
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            yield (Path(root) / name).relative_to(folder)


def take_all(folder: Path, names: Iterable[Path] | None = None) -> dict[str, FileSum]:
    """Return the sums of files (all of them if `names` is None) by their path relative to the folder.

    Raises:
        OSError: a file cannot be read.
    """
    return {name.as_posix(): take(folder / name) for name in (files_below(folder) if names is None else names)}


def damaged(
    folder: Path, sums: Mapping[str, FileSum], *, sizes_only: bool = False, advance: Callable[[int], object] | None = None
) -> Iterator[Damage]:
    """Yield the files of `sums` that are missing or changed; sizes of all of them are compared before any is read.

    Raises:
        ValueError: a name in `sums` leads out of the folder.
    """
    whole = []
    for name, known in sums.items():
        path = _inside(folder, name)
        try:
            size = path.stat().st_size if path.is_file() else None
        except OSError as error:
            yield Damage(path, f"cannot be read ({error.strerror})")
            continue
        if size is None:
            yield Damage(path, "is missing")
        elif size != known.bytes:
            yield Damage(path, f"has {size} bytes instead of {known.bytes}")
        elif known.xxh3 and not sizes_only:
            whole.append((path, known.xxh3))
    for path, expected in whole:
        try:
            found = checksum(path, advance)
        except OSError as error:
            yield Damage(path, f"cannot be read ({error.strerror})")
            continue
        if found != expected:
            yield Damage(path, f"has changed since it was written (checksum {found}, not {expected})")


def _inside(folder: Path, name: str) -> Path:
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts or not relative.parts:
        raise ValueError(f"the name {name!r} leads out of the folder")
    return folder / relative
