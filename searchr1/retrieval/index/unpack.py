"""Packed corpora and pages as plain jsonl: rows are then read in place, whatever the file was.

What is unpacked is a stream: nothing else is written than the rows, and names inside an archive are never used as paths.
Memory is bounded whatever an archive declares, and the disk is never filled to its end.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import shutil
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import IO, Any, Self

from searchr1 import caches
from searchr1.errors import UserError
from searchr1.files.atomic import atomic_file, partial_path
from searchr1.files.checksums import read_sealed, write_sealed
from searchr1.files.parquet_rows import parquet_rows
from searchr1.files.text_rows import MAX_LINE_BYTES, LineTooLong
from searchr1.progress import ProgressBar
from searchr1.retrieval.index.file_identity import (
    BAR_BYTES,
    BLOCK_BYTES,
    FileIdentity,
    confirm_contents,
    hash_file,
    identity_of,
)

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet", ".tar", ".tar.gz", ".tgz")
GZIP_MAGIC = b"\x1f\x8b"
UNPACKED = "unpacked.jsonl"
NOTE_FORMAT = 4
OLD_NOTE_FORMAT = 1
"""Without a checksum. (The numbers differ in two bits: one flipped bit cannot make one of the other.)"""
DAMAGED = (OSError, EOFError, ValueError, zlib.error, tarfile.TarError, RecursionError)
"""What the readers of packed files raise."""
MAX_MEMBERS = 10_000
"""Files in an archive; each takes memory while it is read."""
MAX_HEADER_BYTES = 1 << 20
"""Of the names and notes before a file in an archive, which are read into memory."""
ROOM_BYTES = 1 << 30
"""Left free on the disk, or a fiftieth of a small one."""


def as_jsonl(path: Path, flag: str) -> Path:
    """Return `path` if it is a jsonl file; else a jsonl file, written unless it was made of the same contents.

    It lies beside `path`, or in the user's cache where that folder cannot be written. A .jsonl or .gz file that
    holds a tar archive, as the published wiki-18.jsonl.gz does, is read too.

    Raises:
        UserError: missing, another format, damaged, or no room for the unpacked file; names `flag`.
    """
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file")
    if not path.name.endswith(ENDINGS):
        raise UserError(f"{flag} {path}: expected a {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]} file")
    if path.name.endswith(".jsonl") and not is_packed(path):
        return path
    by_download = path.with_suffix("")  # download.py has unpacked it under its own name
    if path.name.endswith(".jsonl.gz") and read_note(by_download) and is_made_of(by_download, path):
        return by_download
    places = caches.beside_or_cached(path, UNPACKED)
    made = next((place for place in places if place.exists() and is_made_of(place, path)), None)
    if made is not None:
        return made
    output = next(filter(_can_be_written, places), None)
    if output is None:
        raise UserError(
            f"{flag} {path}: cannot unpack it: neither its folder nor this user's cache can be written; {caches.HINT}"
        )
    if output != places[0]:
        print(f"{path.parent}: cannot be written; {path.name} is unpacked into the cache, {output.parent}", flush=True)
    return _unpack(path, output, flag)


def _can_be_written(output: Path) -> bool:
    partial = partial_path(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        partial.unlink()
    except OSError:
        return False
    return True


def is_packed(path: Path) -> bool:
    """Return whether a file is an archive, in spite of its name."""
    with path.open("rb") as file:
        head = file.read(tarfile.BLOCKSIZE)
    return head.startswith(GZIP_MAGIC) or is_tar(head)


def is_tar(head: bytes) -> bool:
    """Return whether a file that begins so is a tar archive: its first block has the right checksum."""
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def unpack(path: Path, output: Path, flag: str) -> Path:
    """Write the rows of `path` into `output`, unless they are there.

    Raises:
        UserError: damaged, without rows, or no room.
    """
    return output if output.exists() and is_made_of(output, path) else _unpack(path, output, flag)


def _unpack(path: Path, output: Path, flag: str) -> Path:
    if output.exists():
        print(f"{output}: is not known to be the contents of {path.name}; written again", flush=True)
    else:
        print(f"{path}: unpacking into {output.name}, once", flush=True)
    note = note_of(output)
    try:
        with atomic_file(output) as partial:
            source, digest = _write(path, partial)
            note.unlink(missing_ok=True)
        unpacked = identity_of(output.stat(), digest, time.time_ns())
        write_note(output, source, unpacked)
    except DAMAGED as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{flag} {path}: cannot unpack it into {output} ({type(error).__name__}: {reason})") from error
    return output


def note_of(output: Path) -> Path:
    """Return the path of the note on what a file was unpacked from."""
    return output.with_name(f"{output.name}.source.json")


def read_note(output: Path) -> tuple[FileIdentity, FileIdentity] | None:
    """Return the identities of the packed file and of the unpacked one, None where there is no whole note."""
    try:
        note = read_sealed(note_of(output), unsealed_formats=(OLD_NOTE_FORMAT,))
        known = note["format"] in (NOTE_FORMAT, OLD_NOTE_FORMAT)
        return (FileIdentity(**note["source"]), FileIdentity(**note["unpacked"])) if known else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write_note(output: Path, source: FileIdentity, unpacked: FileIdentity) -> None:
    """Write the note on what `output` was made from.

    Raises:
        OSError: it cannot be written.
    """
    values = {"format": NOTE_FORMAT, "source": asdict(source), "unpacked": asdict(unpacked)}
    write_sealed(note_of(output), values)


def is_made_of(output: Path, path: Path) -> bool:
    """Return whether `output` holds what was unpacked from the present contents of `path`.

    Raises:
        UserError: one of them cannot be read.
    """
    known = read_note(output)
    if known is None or not output.is_file():
        return False
    try:
        source, unpacked = confirm_contents(path, known[0]), confirm_contents(output, known[1])
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if source is None or unpacked is None:
        return False
    if (source, unpacked) != known:
        with suppress(OSError):  # not ours to write: it is checked again the next time
            write_note(output, source, unpacked)
    return True


def _write(path: Path, output: Path) -> tuple[FileIdentity, str]:
    """Write the rows; return the identity of the packed file and the SHA-256 of the rows."""
    status, read_ns = path.stat(), time.time_ns()
    with output.open("wb") as file:
        rows = _Output(file, output.parent)
        if path.suffix == ".parquet":
            sha256 = hash_file(path)
            _write_parquet(path, rows.write)
        else:
            with _opened(path) as packed:
                _write_lines(packed, rows.write)
                sha256 = packed.finish()
    return identity_of(status, sha256, read_ns), rows.sha256()


class _Output:
    """The rows as they are written: hashed, no line longer than can be read, and never to the end of the disk."""

    def __init__(self, file: IO[bytes], folder: Path) -> None:
        self._file, self._folder = file, folder
        self._digest = hashlib.sha256()
        self._line, self._length = 1, 0
        self._unchecked = BLOCK_BYTES
        """Bytes written since the disk was looked at."""

    def write(self, block: bytes) -> None:
        """Write a block of at most `BLOCK_BYTES`, or one row.

        Raises:
            LineTooLong: a line is longer than is read.
            OSError: the disk is (nearly) full.
        """
        end = block.find(b"\n")
        if self._length + (len(block) if end < 0 else end) > MAX_LINE_BYTES:
            raise LineTooLong(self._line, MAX_LINE_BYTES)
        if end < 0:
            self._length += len(block)
        else:
            self._length = len(block) - block.rfind(b"\n") - 1
            self._line += block.count(b"\n")
        self._unchecked += len(block)
        if self._unchecked > BLOCK_BYTES:
            self._unchecked = 0
            require_room(self._folder)
        self._file.write(block)
        self._digest.update(block)

    def sha256(self) -> str:
        """Return the SHA-256 of what was written."""
        return self._digest.hexdigest()


def require_room(folder: Path) -> None:
    """Reject a write that would fill a disk that others write to as well.

    Raises:
        OSError: it is nearly full.
    """
    usage = shutil.disk_usage(folder)
    if usage.free < min(ROOM_BYTES, usage.total // 50):
        raise OSError(errno.ENOSPC, f"the disk has only {usage.free >> 20} MiB left", str(folder))


class _Packed:
    """A packed file as it is read: counted for the bar, and hashed."""

    def __init__(self, file: IO[bytes], advance: Callable[[int], object]) -> None:
        self._file = file
        self._advance = advance
        self._digest = hashlib.sha256()
        self._unshown = 0

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(size)
        self._digest.update(block)
        self._unshown += len(block)
        if self._unshown >= BLOCK_BYTES or not block:
            self._advance(self._unshown)
            self._unshown = 0
        return block

    def finish(self) -> str:
        """Read what is left, and return the SHA-256 of the whole file."""
        while self.read(BLOCK_BYTES):
            pass
        return self._digest.hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[_Packed]:
    with path.open("rb") as file, ProgressBar(f"unpacking {path.name}", path.stat().st_size, least=BAR_BYTES) as bar:
        yield _Packed(file, bar.advance)


class _Again:
    """A stream whose first bytes were read already."""

    def __init__(self, head: bytes, stream: Any) -> None:
        self._head = head
        self._stream = stream

    def read(self, size: int) -> bytes:
        if self._head:
            head, self._head = self._head[:size], self._head[size:]
            return head
        block: bytes = self._stream.read(size)
        return block


def _write_lines(packed: _Packed, use: Callable[[bytes], object]) -> None:
    """Write the lines of a stream that may be compressed, may be an archive, or both."""
    stream: Any = packed
    head = stream.read(tarfile.BLOCKSIZE)
    if head.startswith(GZIP_MAGIC):
        archive: Any = _Again(head, packed)
        stream = gzip.GzipFile(fileobj=archive)
        head = stream.read(tarfile.BLOCKSIZE)
    elif not is_tar(head):
        raise ValueError("is neither compressed nor an archive")
    whole = _Again(head, stream)
    if is_tar(head):
        _write_member(whole, use)
    while block := whole.read(BLOCK_BYTES):  # after an archive: to the end, where damage shows
        if not is_tar(head):
            use(block)


def _write_member(stream: _Again, use: Callable[[bytes], object]) -> None:
    """Write the one file of rows that a tar archive holds."""
    taken: str | None = None
    others: list[str] = []
    source: Any = stream
    with tarfile.open(fileobj=source, mode="r|", bufsize=1 << 20, tarinfo=_Header) as archive:
        for count, member in enumerate(archive):
            if count == MAX_MEMBERS:
                raise ValueError(f"holds more than {MAX_MEMBERS} files")
            name = PurePosixPath(member.name).name
            if member.isdir() or name.startswith("."):  # hidden files: what macOS adds
                continue
            if member.issparse():
                raise ValueError(f"holds {name!r} with gaps (a sparse file); pack it again without")
            if not member.isreg() or not name.endswith((".jsonl", ".json")):
                others.append(name)
                continue
            if taken is not None:
                raise ValueError(f"holds several files of rows, {taken!r} and {name!r}; unpack the one you want")
            taken = name
            _copy_member(archive.extractfile(member), member.size, use)
    if taken is None:
        raise ValueError(f"holds no .jsonl file, only {', '.join(map(repr, others[:5])) or 'nothing'}")
    if others:
        print(f"only {taken!r} of the archive is read, not {', '.join(map(repr, others[:5]))}", flush=True)


class _Header(tarfile.TarInfo):
    """A header of an archive that does not make its reader take more memory than it should."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Read a header.

        Raises:
            ValueError: it wants too much.
        """
        header = super().frombuf(buf, encoding, errors)
        notes = header.type in (*_NOTES, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        if header.size < 0 or (notes and header.size > MAX_HEADER_BYTES):
            raise ValueError(f"has a damaged header: {header.size} bytes of names and notes")
        return header


_NOTES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)


def _copy_member(member: IO[bytes] | None, size: int, use: Callable[[bytes], object]) -> None:
    while member is not None and (block := member.read(BLOCK_BYTES)):
        size -= len(block)
        use(block)
    if size:
        raise ValueError("ends in the middle of its file of rows")


def _write_parquet(path: Path, use: Callable[[bytes], object]) -> None:
    for row, _ in parquet_rows(path):
        use((json.dumps(row, ensure_ascii=False, default=_as_text) + "\n").encode("utf-8", "surrogatepass"))


def _as_text(value: object) -> str:
    """Return text for what JSON has no form for: bytes of text columns, times and the like."""
    return value.decode() if isinstance(value, bytes) else str(value)
