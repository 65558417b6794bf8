"""Folders in which weights are published: in shared memory, or on disk where that has no room.

Standard library only: the guardian, which starts without site-packages, removes those that killed processes left.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from searchr1.errors import UserError

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "searchr1-weights-"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""Peft's names of an adapter's files, and vLLM's."""
_OURS = ("bucket-*", ADAPTER_WEIGHTS, ADAPTER_CONFIG, "*.partial")
_LOCK = ".lock"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNNAMED = ".new-"
"""Before the prefix, as long as a new folder has no lock yet."""
_STALE_AFTER_SECONDS = 60.0
"""That old, an unnamed folder's process was killed between making and locking it."""

_held_locks: dict[str, int] = {}


class SharedFolder:
    """A locked folder for files that other processes map or read."""

    def __init__(self, root: Path, version: int) -> None:
        """Make it under `root`, after removing what killed processes left there.

        Raises:
            UserError: `root` cannot be written.
        """
        self.path = root / f"{PREFIX}v{version}-{uuid.uuid4().hex[:12]}"
        try:
            root.mkdir(parents=True, exist_ok=True)
            remove_abandoned(root)
            unnamed = root / f"{_UNNAMED}{self.path.name}"
            unnamed.mkdir(mode=0o700)
            _held_locks[str(self.path)] = _lock(unnamed)
            unnamed.rename(self.path)  # never there without its lock
        except OSError as error:
            raise UserError(f"cannot write weights below {root}: {error.strerror}; give a writable folder") from error

    @contextlib.contextmanager
    def removed_on_failure(self) -> Iterator[None]:
        """Remove the folder when the block raises; "no room" becomes a `UserError`."""
        try:
            yield
        except BaseException as error:
            remove_folder(self.path)
            if (isinstance(error, OSError) and error.errno in _NO_ROOM) or "No space left" in str(error):
                raise UserError(
                    f"no room for the weights below {self.path.parent}: {error}; free space there, enlarge /dev/shm "
                    "(docker: --shm-size), or publish to another folder"
                ) from error
            raise

    def remove(self) -> None:
        """Remove the names; what is mapped stays mapped."""
        remove_folder(self.path)


def weight_folders(output_dir: str | Path) -> tuple[Path, Path]:
    """Return where a run may publish weights: shared memory, and a folder of its own where that has no room."""
    return SHARED_MEMORY, Path(output_dir) / "weights"


def weight_directory(needed_bytes: int, fallback: Path) -> Path:
    """Choose where to publish: shared memory if it is writable and has twice the room that is needed, else `fallback`."""
    try:
        if os.access(SHARED_MEMORY, os.W_OK) and shutil.disk_usage(SHARED_MEMORY).free >= 2 * needed_bytes:
            return SHARED_MEMORY
    except OSError:
        pass
    return fallback


def remove_folder(folder: Path) -> None:
    """Remove the files of a `SharedFolder`, and the folder unless someone keeps a file of their own there."""
    for pattern in (*_OURS, _LOCK):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # gone already, or not empty
        folder.rmdir()
    descriptor = _held_locks.pop(str(folder), None)
    if descriptor is not None:
        os.close(descriptor)


def _lock(folder: Path) -> int:
    descriptor = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def remove_abandoned(root: Path) -> None:
    """Remove the folders below `root` whose processes have gone: nobody holds their locks."""
    for folder in root.glob(f"{PREFIX}v*"):
        if str(folder) in _held_locks:
            continue
        try:
            found = folder.lstat()
            if found.st_uid != os.geteuid() or not stat.S_ISDIR(found.st_mode):
                continue
            descriptor = _lock(folder)
        except OSError:
            continue  # another process publishes there, or it is not ours
        remove_folder(folder)
        os.close(descriptor)
    for folder in root.glob(f"{_UNNAMED}{PREFIX}v*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _STALE_AFTER_SECONDS:
                remove_folder(folder)
