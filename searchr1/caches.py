"""Folders for what can be made again: the user's cache, one that nobody else can write to, and the caches of libraries."""

from __future__ import annotations

import atexit
import getpass
import grp
import hashlib
import os
import pwd
import secrets
import shutil
import stat
import sys
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
    """Return whether nobody but this user, and root, can put files into a folder or put another one in its place."""
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
    """Return whether a folder's mode lets other users write to it; a group with nobody else in it is not an other user."""
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


FOLDERS = {
    "HF_HOME": ".cache/huggingface",
    "TORCH_HOME": ".cache/torch",
    "TRITON_CACHE_DIR": ".triton/cache",
    "VLLM_CACHE_ROOT": ".cache/vllm",
    "VLLM_CONFIG_ROOT": ".config/vllm",
    "FLASHINFER_WORKSPACE_BASE": ".cache/flashinfer",
    "MPLCONFIGDIR": ".config/matplotlib",
    "WANDB_CACHE_DIR": ".cache/wandb",
    "WANDB_CONFIG_DIR": ".config/wandb",
    "WANDB_DATA_DIR": ".local/share/wandb",
}
"""The variable that moves a library's folder, and the folder below the home."""
RAY_TOKEN = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
"""What Ray takes the secret from that its processes know each other by."""
MOVED_BY = {".cache": "XDG_CACHE_HOME", ".config": "XDG_CONFIG_HOME", ".local": "XDG_DATA_HOME"}
"""Variables that move all of these folders."""


def provide_caches() -> None:
    """Set what libraries read for this process and its children, where the home cannot be used; report it on standard error.

    What the user has set stays. A folder in a home that can only be read stays where it is: its models can be used.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"uid{os.getuid()}"
    home = _home()
    if home is not None and os.access(home, os.W_OK | os.X_OK):
        return
    if not {*RAY_TOKEN, "RAY_ADDRESS"} & set(os.environ) and not (home is not None and (home / ".ray/auth_token").is_file()):
        os.environ[RAY_TOKEN[0]] = secrets.token_hex(16)  # Ray would write one below the home
    missing = {name: place for name, place in FOLDERS.items() if not _is_chosen(name, place) and not _is_there(home, place)}
    if not missing:
        return
    folder = Path(tempfile.gettempdir()) / f"searchr1-caches-{os.getuid()}"
    if not make_private(folder):
        folder = temporary_private("caches")
    for name, place in missing.items():
        os.environ[name] = str(folder / place)
    what = "no home folder" if home is None else f"the home folder {home} cannot be written to"
    print(f"note: {what}; what libraries download and compile goes to {folder} (set HOME to keep it)", file=sys.stderr)


def _home() -> Path | None:
    """Return the home folder, if there is one."""
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home if home.is_absolute() and home.is_dir() else None


def _is_chosen(name: str, place: str) -> bool:
    return name in os.environ or MOVED_BY.get(place.partition("/")[0], name) in os.environ


def _is_there(home: Path | None, place: str) -> bool:
    return home is not None and (home / place).is_dir()
