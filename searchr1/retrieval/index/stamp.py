"""Whether a file still has the contents that something beside it was made from.

A stamp holds the SHA-256 of the file and what its file system said of it. As long as inode, size, time of modification and
time of change are the same, the contents are: a program can set the time of modification, but not the time of change. If
any of them differs (the file was replaced, copied, moved or touched), or if the file was changed in the same moments in
which it was read, all its bytes are hashed again.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

BLOCK_BYTES = 16 << 20
BAR_BYTES = 256 << 20
"""A smaller file is read before anybody would look at a bar."""
SAME_MOMENT_NS = 2_000_000_000
"""File systems count time in steps; a change so soon after the one before may not show."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """What is known of a file."""

    sha256: str
    bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    read_ns: int
    """When it began to be read."""


def stamp(found: os.stat_result, sha256: str, read_ns: int) -> Stamp:
    """Make the stamp of a file that had the status `found` when it began to be read."""
    return Stamp(sha256, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, read_ns)


def same_file(found: os.stat_result, known: Stamp) -> bool:
    """Whether the status of a file says that its contents are those of a stamp."""
    same = stamp(found, known.sha256, known.read_ns) == known
    return same and known.read_ns - max(known.mtime_ns, known.ctime_ns) > SAME_MOMENT_NS


def confirm(path: Path, known: Stamp) -> Stamp | None:
    """Return the stamp of a file that has the contents of `known`, which is `known` itself where nothing has to be read.

    None if the contents are others.

    Raises:
        OSError: the file cannot be read.
    """
    found = path.stat()
    if same_file(found, known):
        return known
    if found.st_size != known.bytes:
        return None
    read_ns = time.time_ns()
    sha256 = hash_file(path)
    return stamp(found, sha256, read_ns) if sha256 == known.sha256 else None


def hash_file(path: Path) -> str:
    """SHA-256 of a file, with a bar if it is large."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        read_through(file.read, path.stat().st_size, f"checking {path.name}", digest.update)
    return digest.hexdigest()


def read_through(read: Callable[[int], bytes], size: int, what: str, use: Callable[[bytes], object]) -> None:
    """Read to the end, a block at a time, with a bar if it is much."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=size < BAR_BYTES) as progress:
        task = progress.add_task(what, total=size)
        while block := read(BLOCK_BYTES):
            use(block)
            progress.advance(task, len(block))
