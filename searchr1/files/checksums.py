"""Checksums of the files in a folder, and JSON files that carry their own checksum."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from searchr1.files.atomic import write_text
from searchr1.files.folder_lock import is_lock

SEAL = "xxh3"
MAX_BYTES = 64 << 20
"""No such file is larger; a larger one from elsewhere is rejected before it is read."""


def seal(values: Mapping[str, Any]) -> str:
    """Return the checksum of JSON values, however they are laid out in a file."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return str(xxhash.xxh3_128_hexdigest(text.encode("ascii")))


def write_sealed(path: Path, values: Mapping[str, Any]) -> None:
    """Write values with their checksum; the file appears when it is complete.

    Raises:
        OSError: it cannot be written.
    """
    write_text(path, json.dumps({**values, SEAL: seal(values)}, indent=1) + "\n")


def read_sealed(path: Path, unsealed_formats: tuple[int, ...] = ()) -> dict[str, Any]:
    """Return the values of a file that `write_sealed` wrote.

    Args:
        path: the file.
        unsealed_formats: values of `format` that were written without a checksum.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged; the message is a predicate ("is damaged (…)").
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError("is damaged (no object)")
    if SEAL in values or values.get("format") not in unsealed_formats:
        unseal(values)
    return values


def unseal(values: dict[str, Any]) -> None:
    """Take the checksum out of values that were read, and compare it with theirs.

    Raises:
        ValueError: it is missing or another one; the message is a predicate.
    """
    known = values.pop(SEAL, None)
    try:
        same = known == seal(values)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is damaged ({str(error)[:200]})") from error
    if not same:
        raise ValueError("has changed since it was written (it does not fit its own checksum)")


def read_json(path: Path, most_bytes: int = MAX_BYTES) -> Any:
    """Return what a JSON file holds, which a stranger may have written.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or too large to be read at once; the message is a predicate.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("is damaged (no regular file)")
    if found.st_size > most_bytes:
        raise ValueError(f"is damaged (more than {most_bytes >> 20} MiB long)")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is damaged ({str(error)[:200]})") from error


BLOCK_BYTES = 4 << 20
THREADS = 8
"""The most threads; reading and XXH3 let other threads run, and network disks are faster when asked for several files."""


@dataclass(frozen=True, slots=True)
class FileSum:
    """Size and checksum of a file."""

    bytes: int
    xxh3: str
    """32 hexadecimal digits; empty for a file whose size alone is known."""


@dataclass(frozen=True, slots=True)
class Damage:
    """A file that is not what it was."""

    path: Path
    problem: str
    """The problem, as a predicate: "is missing", "has 10 bytes instead of 12"."""

    def __str__(self) -> str:
        return f"{self.path} {self.problem}"


def checksum(path: Path, advance: Callable[[int], object] | None = None) -> str:
    """Return the checksum of a file as 32 hexadecimal digits; `advance` is called with the bytes of every block.

    Raises:
        OSError: the file cannot be read.
    """
    digest = xxhash.xxh3_128()
    block = bytearray(BLOCK_BYTES)
    view = memoryview(block)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(view[:count])
            if advance is not None:
                advance(count)
    return digest.hexdigest()


def take(path: Path, advance: Callable[[int], object] | None = None) -> FileSum:
    """Return the size and the checksum of a file.

    Raises:
        OSError: the file cannot be read.
    """
    return FileSum(path.stat().st_size, checksum(path, advance))


def files_below(folder: Path) -> Iterator[Path]:
    """Yield the paths of all files below a folder, relative to it, in order.

    Symbolic links to folders are not followed, and the lock of a folder that is in use is none of its files.
    """
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if not is_lock(name):
                yield (Path(root) / name).relative_to(folder)


def take_all(folder: Path, names: Iterable[Path] | None = None) -> dict[str, FileSum]:
    """Return the sums of files (all of them if `names` is None) by their path relative to the folder.

    Raises:
        OSError: a file cannot be read.
    """
    wanted = list(files_below(folder) if names is None else names)
    with _threads(len(wanted)) as pool:
        found = pool.map(take, [folder / name for name in wanted])
        return {name.as_posix(): known for name, known in zip(wanted, found, strict=True)}


def damaged(
    folder: Path, sums: Mapping[str, FileSum], *, sizes_only: bool = False, advance: Callable[[int], object] | None = None
) -> Iterator[Damage]:
    """Yield the files of `sums` that are missing or changed; sizes of all of them are compared before any is read.

    Files are read by several threads, which call `advance`.

    Raises:
        ValueError: a name in `sums` leads out of the folder.
    """
    whole = []
    for name, known in sums.items():
        path = inside(folder, name)
        try:
            size = path.stat().st_size if path.is_file() else None
        except OSError as error:
            yield Damage(path, f"cannot be read ({error.strerror})")
            continue
        if size is None:
            yield Damage(path, "is missing")
        elif size != known.bytes:
            yield Damage(path, f"has {size} bytes instead of {known.bytes}")
        elif known.xxh3 and not sizes_only:
            whole.append((path, known.xxh3))

    def changed(path: Path, expected: str) -> Damage | None:
        try:
            found = checksum(path, advance)
        except OSError as error:
            return Damage(path, f"cannot be read ({error.strerror})")
        same = found == expected
        return None if same else Damage(path, f"has changed since it was written (checksum {found}, not {expected})")

    with _threads(len(whole)) as pool:
        yield from (damage for damage in pool.map(lambda item: changed(*item), whole) if damage is not None)


@contextmanager
def _threads(files: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool that drops what it has not begun when the block is left early."""
    pool = ThreadPoolExecutor(max(1, min(files, THREADS, os.cpu_count() or 1)))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file by its name in a folder's table.

    Raises:
        ValueError: the name leads out of the folder.
    """
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts or not relative.parts or "\0" in name:
        raise ValueError(f"the name {name!r} leads out of the folder")
    return folder / relative


FORMAT = 1
_XXH3 = re.compile(r"[0-9a-f]{32}")


class LaterFormat(ValueError):
    """The file is whole, but a later release wrote it."""


@dataclass(frozen=True, slots=True)
class SumsFile:
    """The contents of such a file."""

    files: dict[str, FileSum]
    """Sums by path, relative to the folder."""
    fields: dict[str, Any]
    """What the writer added."""


def write_sums(path: Path, files: Mapping[str, FileSum], **fields: Any) -> None:
    """Write the file, which appears when it is complete.

    Raises:
        OSError: it cannot be written.
    """
    write_sealed(path, {"format": FORMAT, **fields, "files": {name: asdict(known) for name, known in files.items()}})


def read_sums(path: Path) -> SumsFile:
    """Read the file and compare it with its own sum.

    Raises:
        ValueError: it is damaged; the message is a predicate. LaterFormat, which is one, if a later release wrote it.
        OSError: it cannot be read.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise ValueError("is damaged (it names no files)")
    unseal(content)
    version = content.pop("format", None)
    if version != FORMAT:
        raise LaterFormat(f"has format {version}, this searchr1 knows {FORMAT}; update searchr1")
    files = {name: _file_sum(name, known) for name, known in content.pop("files").items()}
    return SumsFile(files, content)


def _file_sum(name: str, known: Any) -> FileSum:
    """Return one entry.

    Raises:
        ValueError: it is none, which a sum that fits does not exclude: anyone can compute one.
    """
    try:
        inside(Path(), name)
    except ValueError as error:
        raise ValueError(f"is damaged ({error})") from error
    if not isinstance(known, dict) or known.keys() != {"bytes", "xxh3"}:
        raise ValueError(f"is damaged (no size and checksum of {name!r})")
    size, xxh3 = known["bytes"], known["xxh3"]
    if type(size) is not int or size < 0 or not isinstance(xxh3, str) or not _XXH3.fullmatch(xxh3):
        raise ValueError(f"is damaged (size {size!r} and checksum {xxh3!r} of {name!r})")
    return FileSum(size, xxh3)
