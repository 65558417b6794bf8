"""Folders for what can be made again: the user's cache, and one that nobody else can write to.

Neither a home folder nor an entry in the password file is taken for granted: a container that runs under any user id has
none.
"""

from __future__ import annotations

import atexit
import grp
import hashlib
import os
import pwd
import shutil
import stat
import tempfile
from functools import partial
from pathlib import Path

HINT = "set XDG_CACHE_HOME to a folder that can be written"


def user_cache() -> Path | None:
    """Return the folder for this program's caches, which need not exist; None if the user has no home."""
    given = os.environ.get("XDG_CACHE_HOME")
    if given:
        return Path(given) / "searchr1"
    try:
        return Path.home() / ".cache" / "searchr1"
    except RuntimeError:  # no HOME, and no entry in the password file
        return None


def beside_or_cached(file: Path, name: str) -> list[Path]:
    """Return where something made from `file` may lie, best first: beside it, or in the user's cache if there is one."""
    cache = user_cache()
    digest = hashlib.sha256(os.fsencode(file.resolve())).hexdigest()[:16]
    cached = [] if cache is None else [cache / "rows" / digest]
    return [file.with_name(f"{file.name}.{name}"), *(folder / name for folder in cached)]


def is_private(folder: Path) -> bool:
    """Whether nobody but this user, and root, can put files into a folder or put another one in its place."""
    trusted = {0, os.geteuid()}
    try:
        path = folder.resolve(strict=True)
        for place in (path, *path.parents):
            found = place.stat()
            shared = others_may_write(found)
            if found.st_uid not in trusted or (shared and (place == path or not found.st_mode & stat.S_ISVTX)):
                return False
    except OSError:
        return False
    return path.is_dir()


def others_may_write(found: os.stat_result) -> bool:
    """Whether a folder's mode lets other users write to it; a group with nobody else in it is no other user."""
    if found.st_mode & stat.S_IWOTH:
        return True
    return bool(found.st_mode & stat.S_IWGRP) and not _is_own_group(found.st_gid)


def _is_own_group(group: int) -> bool:
    try:
        user, known = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:
        return False
    return user.pw_gid == group and known.gr_name == user.pw_name and set(known.gr_mem) <= {user.pw_name}


def make_private(folder: Path) -> bool:
    """Make a folder that only this user can write to; False if that cannot be done."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return False
    return is_private(folder) and os.access(folder, os.W_OK)


def temporary_private(name: str) -> Path:
    """Make a new folder that only this user can write to; this process removes it when it ends.

    Raises:
        OSError: there is no room for one.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"searchr1-{name}-"))
    atexit.register(partial(_remove, folder, os.getpid()))
    return folder


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not in a child that was forked
        shutil.rmtree(folder, ignore_errors=True)
