"""Packed corpora and pages as plain jsonl: rows are then read in place, whatever the file was.

What is unpacked is a stream: nothing else is written than the rows, and names inside an archive are never used as paths.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import IO, Any

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from searchr1.errors import UserError
from searchr1.retrieval.stamp import BAR_BYTES, BLOCK_BYTES, Stamp, confirm, hash_file, stamp

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet", ".tar", ".tar.gz", ".tgz")
GZIP_MAGIC = b"\x1f\x8b"
NOTE_FORMAT = 1
DAMAGED = (OSError, EOFError, ValueError, zlib.error, tarfile.TarError)
"""What the readers of packed files raise."""


def as_jsonl(path: Path, flag: str) -> Path:
    """Return `path` if it is a jsonl file; else a jsonl file beside it, written unless it was made of the same contents.

    A .jsonl or .gz file that holds a tar archive, as the published wiki-18.jsonl.gz does, is read too.

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
    return unpack(path, path.with_name(f"{path.name}.unpacked.jsonl"), flag)


def is_packed(path: Path) -> bool:
    """Whether a file is an archive, in spite of its name."""
    with path.open("rb") as file:
        head = file.read(tarfile.BLOCKSIZE)
    return head.startswith(GZIP_MAGIC) or is_tar(head)


def is_tar(head: bytes) -> bool:
    """Whether a file that begins so is a tar archive: its first block has the right checksum."""
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
    if output.exists():
        if is_made_of(output, path):
            return output
        print(f"{output}: is not known to be the contents of {path.name}; written again", flush=True)
    else:
        print(f"{path}: unpacking into {output.name}, once", flush=True)
    partial = output.with_name(f"{output.name}.{os.getpid()}.partial")
    note = note_of(output)
    try:
        source, digest = _write(path, partial)
        note.unlink(missing_ok=True)
        os.replace(partial, output)
        unpacked = stamp(output.stat(), digest, time.time_ns())
        write_note(output, source, unpacked)
    except DAMAGED as error:
        raise UserError(f"{flag} {path}: cannot unpack it into {output} ({type(error).__name__}: {error})") from error
    finally:
        partial.unlink(missing_ok=True)
    return output


def note_of(output: Path) -> Path:
    """Where it is written what a file was unpacked from."""
    return output.with_name(f"{output.name}.source.json")


def read_note(output: Path) -> tuple[Stamp, Stamp] | None:
    """Return the stamps of the packed file and of the unpacked one, None where there is no note."""
    try:
        note = json.loads(note_of(output).read_text(encoding="utf-8"))
        return (Stamp(**note["source"]), Stamp(**note["unpacked"])) if note["format"] == NOTE_FORMAT else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write_note(output: Path, source: Stamp, unpacked: Stamp) -> None:
    """Write down what `output` was made from.

    Raises:
        OSError: it cannot be written.
    """
    partial = note_of(output).with_name(f"{note_of(output).name}.{os.getpid()}.partial")
    try:
        partial.write_text(
            json.dumps({"format": NOTE_FORMAT, "source": asdict(source), "unpacked": asdict(unpacked)}), encoding="utf-8"
        )
        os.replace(partial, note_of(output))
    finally:
        partial.unlink(missing_ok=True)


def is_made_of(output: Path, path: Path) -> bool:
    """Whether `output` holds what was unpacked from the present contents of `path`.

    Raises:
        UserError: one of them cannot be read.
    """
    known = read_note(output)
    if known is None or not output.is_file():
        return False
    try:
        source, unpacked = confirm(path, known[0]), confirm(output, known[1])
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if source is None or unpacked is None:
        return False
    if (source, unpacked) != known:
        with suppress(OSError):  # not ours to write: it is checked again the next time
            write_note(output, source, unpacked)
    return True


def _write(path: Path, output: Path) -> tuple[Stamp, str]:
    """Write the rows; return the stamp of the packed file and the SHA-256 of the rows."""
    found, read_ns = path.stat(), time.time_ns()
    digest = hashlib.sha256()
    with output.open("wb") as target:

        def use(block: bytes) -> None:
            target.write(block)
            digest.update(block)

        if path.suffix == ".parquet":
            sha256 = hash_file(path)
            _write_rows(path, use)
        else:
            with _opened(path) as packed:
                _write_lines(packed, use)
                sha256 = packed.finish()
    return stamp(found, sha256, read_ns), digest.hexdigest()


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
    size = path.stat().st_size
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with path.open("rb") as file, Progress(*columns, disable=size < BAR_BYTES) as progress:
        task = progress.add_task(f"unpacking {path.name}", total=size)
        yield _Packed(file, lambda count: progress.advance(task, count))


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
    with tarfile.open(fileobj=source, mode="r|", bufsize=1 << 20) as archive:
        for member in archive:
            name = PurePosixPath(member.name).name
            if member.isdir() or name.startswith("."):  # hidden files: what macOS adds
                continue
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


def _copy_member(member: IO[bytes] | None, size: int, use: Callable[[bytes], object]) -> None:
    while member is not None and (block := member.read(BLOCK_BYTES)):
        size -= len(block)
        use(block)
    if size:
        raise ValueError("ends in the middle of its file of rows")


def _write_rows(path: Path, use: Callable[[bytes], object]) -> None:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as table:
        for batch in table.iter_batches(batch_size=4096):
            rows = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in batch.to_pylist())
            use("".join(rows).encode("utf-8", "surrogatepass"))
