"""numba, with a place for compiled code that is safe to load from.

What numba keeps of compiled functions is a pickle: whoever can write it runs code in every process that loads it. It is kept
beside the source, which whoever can write there could change anyway, or else in a folder that only this user can write to.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from searchr1 import caches
from searchr1.errors import UserError

VARIABLE = "NUMBA_CACHE_DIR"


def prepare_cache(beside: Path) -> None:
    """Set the folder for compiled code of modules in `beside`, where numba's own choice is not available or not safe.

    Raises:
        UserError: there is no folder that can be written.
    """
    given = os.environ.get(VARIABLE)
    if given and caches.make_private(Path(given)):
        return
    if given:
        print(f"{VARIABLE}={given}: cannot be written, or others can write to it; it is not used", flush=True)
    elif _is_as_safe(beside):
        return  # numba's own choice
    cache = caches.user_cache()
    folder = cache / "numba" if cache is not None else None
    if folder is None or not caches.make_private(folder):
        try:
            folder = caches.temporary_private("numba")
        except OSError as error:
            raise UserError(f"{VARIABLE}: no folder can be written for compiled code ({error}); set it to one") from error
        print(f"{folder}: compiled code is kept here until the end, so each start takes longer; {caches.HINT}", flush=True)
    os.environ[VARIABLE] = str(folder)
    if "numba" in sys.modules:
        numba.config.CACHE_DIR = str(folder)


def _is_as_safe(beside: Path) -> bool:
    """Return whether compiled code can be kept beside the source: nobody may write there who cannot change the source."""
    kept = beside / "__pycache__"
    try:
        if not kept.exists():
            return os.access(beside, os.W_OK)
        source, status = beside.stat(), kept.stat()
    except OSError:
        return False
    lax = caches.others_may_write(status) and not caches.others_may_write(source)
    return os.access(kept, os.W_OK) and not lax and status.st_uid in (0, os.geteuid(), source.st_uid)


prepare_cache(Path(__file__).parent)

import numba  # noqa: E402  (it reads the variable when it is imported)

__all__ = ["numba"]
