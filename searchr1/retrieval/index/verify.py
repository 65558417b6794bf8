"""Check that an index, a corpus or a page store is what was built."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

from searchr1 import caches
from searchr1.errors import UserError
from searchr1.files.checksums import Damage, damaged
from searchr1.retrieval.index.file_identity import BLOCK_BYTES, FileIdentity, is_unchanged
from searchr1.retrieval.index.index_check import check_bm25, check_faiss, reject_pointer
from searchr1.retrieval.index.manifest import DamagedIndex, Manifest, open_manifest
from searchr1.retrieval.index.rows import SUMMARY, read_summary, table_damage
from searchr1.retrieval.index.unpack import ENDINGS, UNPACKED, note_of, read_note

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
        yield Damage(folder, "has neither a manifest.json nor a FAISS file (*.index): it is not a finished index")
    for file in files:
        print_note(f"{file}: has no checksum to compare it with; only its structure is checked")
        yield from check_form(folder, None, file)


def check_contents(folder: Path, manifest: Manifest, advance: Advance | None) -> Iterator[Damage]:
    """Yield files that have changed since the index was built."""
    for name in manifest.names():
        try:
            reject_pointer(folder / name)
        except DamagedIndex as error:
            yield error.damage
            return
    if manifest.files is None:
        print_note(f"{folder}: was built before checksums were kept; only the structure of its files is checked")
        return
    yield from damaged(folder, manifest.files, advance=advance)


def check_form(folder: Path, manifest: Manifest | None, file: Path) -> Iterator[Damage]:
    """Yield what would lead compiled code astray, the first such place only."""
    try:
        if manifest is not None and manifest.kind == "bm25":
            check_bm25(folder, manifest)
            return
        if importlib.util.find_spec("faiss") is None:
            print_note(f"{file}: FAISS is not installed, so its structure is not checked")
            return
        reject_pointer(file)
        check_faiss(folder, manifest, file)
    except DamagedIndex as error:
        yield error.damage
    except UserError as error:
        yield Damage(folder, f"cannot be used ({error})")


def print_note(line: str) -> None:
    """Print a line that is not the result."""
    print(line, file=sys.stderr, flush=True)


KINDS = ("passages", "pages")
"""Kinds of tables."""


def check_rows(path: Path, advance: Advance | None = None) -> Iterator[Damage]:
    """Yield what has changed of a file of rows, its unpacked form and their tables; `advance` gets the bytes of each block.

    Raises:
        UserError: no such file, not one of rows, or nothing is known of it since nobody has used it yet.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; name a corpus or a page store")
    if not path.name.endswith(ENDINGS):
        raise UserError(f"{path}: is not a corpus or a page store; their names end in {', '.join(ENDINGS)}")
    sums: dict[Path, str] = {}
    known = False
    for output in _unpacked(path):
        note = read_note(output)
        if note is None:
            yield Damage(note_of(output), f"is damaged, so {output.name} is made again at the next start")
            continue
        known = True
        yield from _changed(path, note[0], sums, advance)
        yield from _changed(output, note[1], sums, advance)
    for file in (path, *_unpacked(path)):
        for table in _tables(file):
            damage = list(table_damage(table, advance))
            yield from damage
            if not any(each.path.name == SUMMARY for each in damage):
                known = True
                yield from _changed(file, read_summary(table).file, sums, advance)
    if not known:
        raise UserError(
            f"{path}: nothing is known of its contents; a server or an index build that reads it once notes its checksums"
        )


def bytes_of_rows(path: Path) -> int:
    """Return how many bytes `check_rows` reads."""
    files = [path, *_unpacked(path)]
    return sum(file.stat().st_size for place in files for file in (place, *_files(place)) if file.is_file())


def _files(file: Path) -> Iterator[Path]:
    for table in _tables(file):
        yield from table.glob("*.npy")


def _unpacked(path: Path) -> list[Path]:
    """Return the existing files that `path` was unpacked into."""
    places = caches.beside_or_cached(path, UNPACKED)
    if path.name.endswith(".jsonl.gz"):
        places.insert(0, path.with_suffix(""))  # of download.py
    return [place for place in places if place.is_file() and note_of(place).is_file()]


def _tables(file: Path) -> list[Path]:
    places = (place for kind in KINDS for place in caches.beside_or_cached(file, kind))
    return [place for place in places if place.is_dir()]


def _changed(path: Path, known: FileIdentity, sums: dict[Path, str], advance: Advance | None) -> Iterator[Damage]:
    """Yield a file that is not what its identity says; `sums` are those of files that were read already."""
    try:
        status = path.stat()
        if status.st_size != known.bytes:
            if path not in sums:
                sums[path] = ""
                yield Damage(path, f"has {status.st_size} bytes instead of {known.bytes}: replaced, cut off or edited")
            return
        if path not in sums:
            sums[path] = _hash(path, advance)
            if sums[path] != known.sha256:
                damaged = is_unchanged(status, known)
                times = (
                    "though its times have not: it is damaged" if damaged else "and so have its times: damaged, or edited"
                )
                yield Damage(path, f"has changed since it was read first, {times}")
    except OSError as error:
        yield Damage(path, f"cannot be read ({error.strerror})")


def _hash(path: Path, advance: Advance | None) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            if advance is not None:
                advance(len(block))
    return digest.hexdigest()
