"""Files and folders that appear complete, or not at all.

Contents are written beside the final place, under `NAME.PID.partial`, which is then renamed. A reader, and a process that
goes on after a kill, see the old contents or the new ones.

**What survives a power cut.** What cannot be made again in minutes (checkpoints, converted models, parts of an index in the
making, an evaluation's ledger) is on the disk before it gets its name: `atomic_folder(..., durable=True)` for a whole
folder, `sync` or `os.fsync` for a file that grows. Everything else (pages, tables, notes, caches) survives the kill of its
process, and no `fsync` is spent on it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def partial_path(path: Path) -> Path:
    """Return where the contents of `path` are until they are complete."""
    return path.with_name(f"{path.name}.{os.getpid()}.partial")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; it takes the place of `path` when the block ends well, and is deleted otherwise.

    Raises:
        OSError: the folder is missing or cannot be written, or the disk is full.
    """
    partial = partial_path(path)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        with suppress(OSError):  # the reason is on its way
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str | Iterable[str]) -> None:
    """Write UTF-8 text, whole or in parts that follow each other.

    Halves of surrogate pairs, which UTF-8 cannot hold, become escapes (`\\ud800`), as JSON writes them.

    Raises:
        OSError: it cannot be written.
    """
    parts = [text] if isinstance(text, str) else text
    with atomic_file(path) as partial, partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(parts)


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes.

    Raises:
        OSError: they cannot be written.
    """
    with atomic_file(path) as partial:
        partial.write_bytes(content)


@contextmanager
def atomic_folder(
    path: Path, *, durable: bool = False, replace: bool = False, partial_name: str | None = None
) -> Iterator[Path]:
    """Yield a new folder to write into; it gets the name `path` when the block ends well, and is deleted otherwise.

    Missing parents are made, and removed again after a failure.

    Args:
        path: does not exist, or is an empty folder.
        durable: all files are on the disk before the folder gets its name.
        replace: `path` may hold something, which is deleted.
        partial_name: the folder's name until then.

    Raises:
        OSError: it cannot be written, or the disk is full.
    """
    missing = [folder for folder in path.parents if not folder.exists()]
    partial = path.with_name(partial_name) if partial_name else partial_path(path)
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process that had this one's number
    complete = False
    try:
        partial.mkdir(parents=True)
        yield partial
        if durable:
            sync([*partial.rglob("*"), partial])
        if replace and path.exists():
            shutil.rmtree(path)
        partial.rename(path)
        complete = True
        if durable:
            sync([path.parent])
    finally:
        if not complete:
            shutil.rmtree(partial, ignore_errors=True)
            for folder in missing:
                with suppress(OSError):
                    folder.rmdir()


def sync(paths: Iterable[Path]) -> None:
    """Return when the contents of files, and the names in folders, are on the disk.

    Raises:
        OSError: the disk failed.
    """
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
