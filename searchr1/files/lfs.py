"""Git LFS pointers: small text files that stand where the real ones were not downloaded."""

from __future__ import annotations

from pathlib import Path

from searchr1.errors import UserError

_LARGEST_POINTER = 1024
"""The specification's limit."""
_BEGINNINGS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")


def is_pointer(path: Path) -> bool:
    """Return whether a file is a pointer; False where it cannot be read."""
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_POINTER:
            return False
        with path.open("rb") as file:
            return file.read(64).startswith(_BEGINNINGS)
    except OSError:
        return False


def reject_pointer(path: Path) -> None:
    """Reject a Git LFS pointer.

    Raises:
        UserError: it is a pointer.
    """
    if is_pointer(path):
        raise UserError(f"{path}: is a Git LFS pointer, not the file; run git lfs pull in its folder, or download it again")
