"""A folder for temporary files whose path leaves room for the sockets in it.

The path of a Unix socket has at most 107 bytes. Ray, vLLM and others put theirs below TMPDIR, and end with a traceback, or
without a word, where that is longer. The folder stays where the user wants it; it is only reached by a shorter path.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from searchr1.errors import UserError

SOCKET_BYTES = 107
RAY_BYTES = SOCKET_BYTES - len("/ray/session_2026-01-02_03-04-05_678901_1234567/sockets/plasma_store")
"""The longest folder below which Ray's longest socket fits."""
VLLM_BYTES = SOCKET_BYTES - len("/01234567-89ab-cdef-0123-456789abcdef")
VARIABLES = ("TMPDIR", "RAY_TMPDIR", "VLLM_RPC_BASE_PATH")
SHORT = ("/tmp", "/var/tmp", "/dev/shm")
"""Folders in which the shorter path may begin; $XDG_RUNTIME_DIR comes last, as it goes when the user logs out."""


def shorten_temp_folder(most_bytes: int) -> None:
    """Let this process and its children reach the folders for temporary files by paths of at most `most_bytes`.

    Raises:
        UserError: a folder is missing or not writable, or there is no place for a shorter path.
    """
    for variable in VARIABLES:
        given = os.environ.get(variable)
        if given is None:
            continue
        if not given:  # Python ignores it, Ray takes it for the current folder
            del os.environ[variable]
            continue
        folder = os.path.abspath(given)
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
            what = "is not writable" if os.path.isdir(folder) else "is not a folder"
            raise UserError(f"{variable}: {folder} {what}; make it so, name another one, or unset {variable}")
        size = len(os.fsencode(folder))
        if size > most_bytes:
            short = _link(variable, folder, most_bytes)
            print(f"{variable}: {folder} is too long for sockets ({size} bytes); reached as {short} instead", flush=True)
            folder = short
        os.environ[variable] = folder
    tempfile.tempdir = None  # to be looked up again


def _link(variable: str, folder: str, most_bytes: int) -> str:
    """Return a short path of a folder, for as long as this process runs; only this user can pass through it."""
    places = short_places()
    for place in places:
        try:
            private = tempfile.mkdtemp(prefix="sr1-", dir=place)
        except OSError:
            continue
        short = os.path.join(private, "t")
        try:
            if len(os.fsencode(short)) <= most_bytes:
                os.symlink(folder, short)
                atexit.register(_remove, private, os.getpid())
                return short
        except OSError:
            pass
        shutil.rmtree(private, ignore_errors=True)
    raise UserError(
        f"{variable}: {folder} is too long for sockets (at most {most_bytes} bytes), and there is no place for a shorter "
        f"path in {', '.join(places)}; set {variable} to a shorter folder"
    )


def short_places() -> Sequence[str]:
    """Return folders that may hold the shorter path, best first."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return (*SHORT, runtime) if runtime else SHORT


def _remove(private: str, process: int) -> None:
    if os.getpid() == process:
        Path(private, "t").unlink(missing_ok=True)
        shutil.rmtree(private, ignore_errors=True)
