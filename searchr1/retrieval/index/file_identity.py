"""Whether a file still has the contents that something beside it was made from.

An identity holds the SHA-256 of a file and what the file system said of it. As long as inode, size, time of modification and
time of change are the same, the contents are: a program can set the time of modification, but not the time of change. If
any of them differs (the file was replaced, copied, moved or touched), or if the file was changed in the same moments in
which it was read, all its bytes are hashed again.
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

from searchr1.progress import ProgressBar

BLOCK_BYTES = 16 << 20
BAR_BYTES = 256 << 20
"""Files of fewer bytes are read without a progress bar."""
SAME_MOMENT_NS = 2_000_000_000
"""File systems count time in steps; a change so soon after the one before may not show."""


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """The contents of a file, and how its file system described it when they were read."""

    sha256: str
    bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    read_ns: int
    """When the reading began."""


def identity_of(status: os.stat_result, sha256: str, read_ns: int) -> FileIdentity:
    """Return the identity of a file that had this status when the reading began."""
    return FileIdentity(sha256, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, read_ns)


def is_unchanged(status: os.stat_result, known: FileIdentity) -> bool:
    """Return whether the status of a file proves that its contents are the known ones."""
    same = identity_of(status, known.sha256, known.read_ns) == known
    return same and known.read_ns - max(known.mtime_ns, known.ctime_ns) > SAME_MOMENT_NS


def confirm_contents(path: Path, known: FileIdentity) -> FileIdentity | None:
    """Return the present identity of a file that has the known contents; None if it has others.

    It is `known` itself where nothing has to be read.

    Raises:
        OSError: the file cannot be read.
    """
    status = path.stat()
    if is_unchanged(status, known):
        return known
    if status.st_size != known.bytes:
        return None
    read_ns = time.time_ns()
    sha256 = hash_file(path)
    return identity_of(status, sha256, read_ns) if sha256 == known.sha256 else None


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file, ProgressBar(f"checking {path.name}", path.stat().st_size, least=BAR_BYTES) as bar:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            bar.advance(len(block))
    return digest.hexdigest()
