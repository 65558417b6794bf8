"""Whether an index is what was built: every byte, and what compiled code relies on."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from searchr1.checksums import Damage, damaged
from searchr1.errors import UserError
from searchr1.retrieval.index_check import check_bm25, check_faiss, refuse_pointer
from searchr1.retrieval.manifest import DamagedIndex, Manifest, open_manifest

Advance = Callable[[int], object]


def check_index(folder: Path, advance: Advance | None = None) -> Iterator[Damage]:
    """Yield what is wrong with the index in a folder; `advance` is called with the bytes that were read.

    A folder without a manifest holds FAISS files, as published; of those only the structure can be checked.
    """
    try:
        manifest = open_manifest(folder)
    except DamagedIndex as error:
        yield error.damage
        return
    if manifest is None:
        yield from check_bare(folder)
        return
    changed = False
    for damage in check_contents(folder, manifest, advance):
        changed = True
        yield damage
    if not changed:
        yield from check_form(folder, manifest, folder / (manifest.file or ""))


def checked_by(folder: Path) -> str:
    """Return what `check_index` compares an index with."""
    try:
        manifest = open_manifest(folder)
    except DamagedIndex:
        return "its manifest"
    return "checksums" if manifest is not None and manifest.files is not None else "its structure; it has no checksums"


def check_bare(folder: Path) -> Iterator[Damage]:
    """Yield what is wrong with the form of the FAISS files in a folder."""
    files = sorted(folder.glob("*.index"))
    if not files:
        yield Damage(folder, "has neither a manifest.json nor a FAISS file (*.index): it is no finished index")
    for file in files:
        say(f"{file}: has no checksum to compare it with; only its structure is checked")
        yield from check_form(folder, None, file)


def check_contents(folder: Path, manifest: Manifest, advance: Advance | None) -> Iterator[Damage]:
    """Yield files that have changed since the index was built."""
    for name in manifest.names():
        try:
            refuse_pointer(folder / name)
        except DamagedIndex as error:
            yield error.damage
            return
    if manifest.files is None:
        say(f"{folder}: was built before checksums were kept; only the structure of its files is checked")
        return
    yield from damaged(folder, manifest.files, advance=advance)


def check_form(folder: Path, manifest: Manifest | None, file: Path) -> Iterator[Damage]:
    """Yield what would lead compiled code astray, the first such place only."""
    try:
        if manifest is not None and manifest.kind == "bm25":
            check_bm25(folder, manifest)
            return
        if importlib.util.find_spec("faiss") is None:
            say(f"{file}: FAISS is not installed, so its structure is not checked")
            return
        refuse_pointer(file)
        check_faiss(folder, manifest, file)
    except DamagedIndex as error:
        yield error.damage
    except UserError as error:
        yield Damage(folder, f"cannot be used ({error})")


def say(line: str) -> None:
    """Print a line that is not the result."""
    print(line, file=sys.stderr, flush=True)
