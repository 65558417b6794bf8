"""Whether a corpus or a page store, and what was made from it, are what they were when they were first read.

A start of the server trusts a file whose inode, size and times are those that were noted; damage on a disk leaves them as
they are. So every byte is read here, whatever the file system says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

from searchr1 import caches
from searchr1.checksums import Damage
from searchr1.errors import UserError
from searchr1.retrieval.row_table import SUMMARY, read_summary, table_damage
from searchr1.retrieval.stamp import BLOCK_BYTES, Stamp, same_file
from searchr1.retrieval.unpack import ENDINGS, UNPACKED, note_of, read_note

KINDS = ("passages", "pages")
"""What a table may be of."""
Advance = Callable[[int], object]


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
                yield from _changed(file, read_summary(table).stamp, sums, advance)
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
    """Existing files that `path` was unpacked into."""
    places = caches.beside_or_cached(path, UNPACKED)
    if path.name.endswith(".jsonl.gz"):
        places.insert(0, path.with_suffix(""))  # of download.py
    return [place for place in places if place.is_file() and note_of(place).is_file()]


def _tables(file: Path) -> list[Path]:
    places = (place for kind in KINDS for place in caches.beside_or_cached(file, kind))
    return [place for place in places if place.is_dir()]


def _changed(path: Path, known: Stamp, sums: dict[Path, str], advance: Advance | None) -> Iterator[Damage]:
    """Yield a file that is not what a stamp says; `sums` are those of files that were read already."""
    try:
        found = path.stat()
        if found.st_size != known.bytes:
            if path not in sums:
                sums[path] = ""
                yield Damage(path, f"has {found.st_size} bytes instead of {known.bytes}: replaced, cut off or edited")
            return
        if path not in sums:
            sums[path] = _hash(path, advance)
            if sums[path] != known.sha256:
                damaged = same_file(found, known)
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
