"""The new folder that a conversion writes."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from searchr1.errors import UserError
from searchr1.files.atomic import atomic_folder

Carry = Callable[[Path, Path], str]
"""Write into the new folder (the second) what belongs to the checkpoint (the first) besides weights; return a line."""


@contextmanager
def new_folder(output: Path, need_bytes: int) -> Iterator[Path]:
    """Yield a folder to write into; it gets the name `output` when the block ends well, and is deleted otherwise.

    Args:
        output: must not exist, or be an empty folder.
        need_bytes: what will be written, compared with the free space first.

    Raises:
        UserError: `output` is in use, or the disk is full or not writable.
    """
    check_unused(output)
    try:
        with atomic_folder(output, durable=True) as partial:
            free = shutil.disk_usage(partial).free
            if free < need_bytes:
                raise UserError(f"--output {output}: needs {_gib(need_bytes)}, but the disk has {_gib(free)} free")
            yield partial
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else str(error)
        raise UserError(f"--output {output}: cannot write: {reason}; nothing was left there") from error


def check_unused(output: Path) -> None:
    """Check that a new folder can be made, before anything is read.

    Raises:
        UserError: the output is a file, or a folder with something in it.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: exists and is not empty; give a new folder")


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"
