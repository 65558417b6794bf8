"""A folder that appears when it is complete, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from searchr1.errors import UserError


@contextmanager
def new_folder(output: Path, need_bytes: int) -> Iterator[Path]:
    """A folder beside `output` to write into; it gets that name when the block ends well, else it is deleted.

    Args:
        output: must not exist, or be an empty folder.
        need_bytes: what will be written, compared with the free space first.

    Raises:
        UserError: `output` is in use, or the disk is full or not writable.
    """
    refuse_used(output)
    made = _missing_parents(output)
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    ok = False
    try:
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if free < need_bytes:
            raise UserError(f"--output {output}: needs {_gib(need_bytes)}, but the disk has {_gib(free)} free")
        yield partial
        if output.exists():
            output.rmdir()
        partial.rename(output)
        ok = True
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else str(error)
        raise UserError(f"--output {output}: cannot write: {reason}; nothing was left there") from error
    finally:
        if not ok:
            shutil.rmtree(partial, ignore_errors=True)
            for folder in made:
                with suppress(OSError):
                    folder.rmdir()


def refuse_used(output: Path) -> None:
    """Check early, before anything is read.

    Raises:
        UserError: the output is a file, or a folder with something in it.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: exists and is not empty; give a new folder")


def _missing_parents(output: Path) -> list[Path]:
    return [folder for folder in output.parents if not folder.exists()]


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"
