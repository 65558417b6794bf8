"""Checksums of the files in a folder, and what has changed since they were taken.

XXH3 (128 bits) notices damage, at the speed of memory. It is no protection against someone who changes a file and its
checksum: what keeps a stranger's file from doing harm is how it is read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import xxhash

from searchr1.folder_lock import is_lock

BLOCK_BYTES = 4 << 20
THREADS = 8
"""At most; reading and XXH3 let other threads run, and network disks are faster when asked for several files."""


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
    """Yield the paths of all files below a folder, relative to it, in order.

    Symbolic links to folders are not followed, and the lock of a folder that is in use is none of its files.
    """
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if not is_lock(name):
                yield (Path(root) / name).relative_to(folder)


def take_all(folder: Path, names: Iterable[Path] | None = None) -> dict[str, FileSum]:
    """Return the sums of files (all of them if `names` is None) by their path relative to the folder.

    Raises:
        OSError: a file cannot be read.
    """
    wanted = list(files_below(folder) if names is None else names)
    with _threads(len(wanted)) as pool:
        found = pool.map(take, [folder / name for name in wanted])
        return {name.as_posix(): known for name, known in zip(wanted, found, strict=True)}


def damaged(
    folder: Path, sums: Mapping[str, FileSum], *, sizes_only: bool = False, advance: Callable[[int], object] | None = None
) -> Iterator[Damage]:
    """Yield the files of `sums` that are missing or changed; sizes of all of them are compared before any is read.

    Files are read by several threads, which call `advance`.

    Raises:
        ValueError: a name in `sums` leads out of the folder.
    """
    whole = []
    for name, known in sums.items():
        path = inside(folder, name)
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

    def changed(path: Path, expected: str) -> Damage | None:
        try:
            found = checksum(path, advance)
        except OSError as error:
            return Damage(path, f"cannot be read ({error.strerror})")
        same = found == expected
        return None if same else Damage(path, f"has changed since it was written (checksum {found}, not {expected})")

    with _threads(len(whole)) as pool:
        yield from (damage for damage in pool.map(lambda item: changed(*item), whole) if damage is not None)


@contextmanager
def _threads(files: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool that drops what it has not begun when the block is left early."""
    pool = ThreadPoolExecutor(max(1, min(files, THREADS, os.cpu_count() or 1)))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file by its name in a folder's table.

    Raises:
        ValueError: the name leads out of the folder.
    """
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts or not relative.parts or "\0" in name:
        raise ValueError(f"the name {name!r} leads out of the folder")
    return folder / relative
