"""Checkpoints of a run: folders that are whole or not there, and whether their bytes are those written."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from searchr1.checkpoints.model_folder import verify_weights
from searchr1.errors import UserError
from searchr1.files.atomic import atomic_folder, sync
from searchr1.files.checksums import (
    Damage,
    FileSum,
    LaterFormat,
    damaged,
    files_below,
    inside,
    read_json,
    read_sums,
    take,
    take_all,
    write_sums,
)
from searchr1.progress import Advance, ProgressBar

MANIFEST = "manifest.json"
SIZES = "sizes.json"
_BAR_BYTES = 1 << 30
"""Less is read before anybody would look at a bar."""
_RANK_SUMS = ".sums_"
_RESUME = "runner.resume_dir="
_FINAL = re.compile(r"global_step_(\d+)")


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint was when it was written."""

    files: dict[str, FileSum]
    has_sums: bool
    """Return whether changed bytes can be noticed."""


def checkpoint_steps(root: Path) -> list[int]:
    """Return the steps with a complete checkpoint, ascending."""
    if not root.is_dir():
        return []
    matches = (_FINAL.fullmatch(folder.name) for folder in root.iterdir() if is_complete(folder))
    return sorted(int(match.group(1)) for match in matches if match)


def is_complete(folder: Path) -> bool:
    """Return whether a folder is a checkpoint that was written to its end."""
    return (folder / MANIFEST).is_file() or (folder / SIZES).is_file()


def latest_checkpoint(root: Path) -> Path | None:
    """Return the newest complete checkpoint, or None.

    Raises:
        UserError: it has been damaged since it was written.
    """
    steps = checkpoint_steps(root)
    if not steps:
        return None
    newest = root / f"global_step_{steps[-1]}"
    verify_checkpoint(newest)
    return newest


def write_manifest(folder: Path, step: int, known: Mapping[str, FileSum]) -> None:
    """Name every file of a checkpoint with its sum.

    Args:
        folder: the checkpoint, complete but for this.
        step: its step.
        known: sums that have been taken already; the others are taken now.

    Raises:
        OSError: a file cannot be read, does not fit its sum, or the manifest cannot be written.
    """
    names = list(files_below(folder))
    for name, found in known.items():
        size = (folder / name).stat().st_size
        if size != found.bytes:
            raise OSError(f"{folder / name} has {size} bytes, but {found.bytes} were written")
    sums = {**known, **take_all(folder, [name for name in names if name.as_posix() not in known])}
    write_sums(folder / MANIFEST, {name.as_posix(): sums[name.as_posix()] for name in names}, step=step)


def write_rank_sums(folder: Path, rank: int) -> None:
    """Sum the tensors that a rank has written into `folder`, part of a checkpoint, for the manifest that follows.

    Raises:
        OSError: they cannot be read, or the sums not be written.
    """
    sums = {path.name: take(path) for path in sorted(folder.glob(f"__{rank}_*.distcp"))}
    write_sums(folder / f"{_RANK_SUMS}{rank}.json", sums)


def rank_sums(folder: Path) -> dict[str, FileSum]:
    """Return what ranks have summed of a checkpoint that is being written, and remove their files."""
    found: dict[str, FileSum] = {}
    for path in sorted(folder.glob(f"*/{_RANK_SUMS}*")):
        with suppress(ValueError):  # cut short with its writer: the files are summed again
            found |= {f"{path.parent.name}/{name}": known for name, known in read_sums(path).files.items()}
        path.unlink()
    return found


def read_contents(folder: Path) -> Contents:
    """Return the contents of a checkpoint's manifest.

    Raises:
        UserError: it has none, or a damaged one.
    """
    try:
        return _read(folder)
    except FileNotFoundError as error:
        raise UserError(
            f"{folder}: is not a complete checkpoint (it has no {MANIFEST}); give a folder named global_step_N"
        ) from error
    except OSError as error:
        raise UserError(f"{error.filename}: not readable ({error.strerror}); make it readable") from error
    except LaterFormat as error:
        raise UserError(str(error)) from error
    except ValueError as error:
        raise UserError(f"{error}: the checkpoint is damaged{_advice(folder, '', _RESUME)}") from error


def _read(folder: Path) -> Contents:
    """Return it.

    Raises:
        ValueError: it is damaged; names it.
        OSError: it cannot be read, or there is none.
    """
    path = folder / MANIFEST
    if path.exists():
        try:
            return Contents(read_sums(path).files, has_sums=True)
        except LaterFormat as error:
            raise LaterFormat(f"{path} {error}") from error
        except ValueError as error:
            raise ValueError(f"{path} {error}") from error
    path = folder / SIZES
    try:
        sizes = read_json(path)
        if not isinstance(sizes, dict) or not all(type(size) is int for size in sizes.values()):
            raise ValueError("is damaged (no table of sizes)")
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    try:
        for name in sizes:
            inside(folder, name)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    return Contents({name: FileSum(size, "") for name, size in sizes.items()}, has_sums=False)


def changed_files(folder: Path, contents: Contents, below: str = "", advance: Advance | None = None) -> Iterator[Damage]:
    """Yield the files of a checkpoint that are missing or changed.

    Args:
        folder: the checkpoint.
        contents: what it was.
        below: only files in this folder of it.
        advance: called with the bytes of every block that was read, by several threads.
    """
    yield from damaged(folder, _below(contents, below), advance=advance)


def bytes_to_read(contents: Contents, below: str = "") -> int:
    """Return how many bytes `changed_files` reads if no file was cut short."""
    return sum(known.bytes for known in _below(contents, below).values() if known.xxh3)


def verify_checkpoint(folder: Path, below: str = "", use: str = _RESUME) -> None:
    """Compare every file with what was written; of a checkpoint without sums only the sizes, and say so.

    Reads all bytes, at the disk's speed: once, by one process, before anything else reads them.

    Args:
        folder: the checkpoint.
        below: only files in this folder of it.
        use: what to write before another checkpoint's path to use that one.

    Raises:
        UserError: a file is missing or changed; names it, and the newest older checkpoint that is intact.
    """
    contents = read_contents(folder)
    if not contents.has_sums:
        print(f"{folder}: was written without checksums; sizes are compared, contents cannot be", flush=True)
    damage = _first_damage(folder, contents, below, f"verifying {folder.name}")
    if damage is not None:
        raise UserError(f"{damage}: the checkpoint is damaged{_advice(folder, below, use)}")


def verify_source(folder: Path, use: str) -> None:
    """Compare a folder of weights with what was written: by the checkpoint that it is part of, or by the sums in it.

    Args:
        folder: the actor's or the critic's.
        use: as of `verify_checkpoint`.

    Raises:
        UserError: a file is missing or changed.
    """
    for place in (folder, folder.resolve()):
        if place.name not in ("", "..") and is_run_checkpoint(place.parent):
            verify_checkpoint(place.parent, place.name, use)
            return
    verify_weights(folder)


def is_run_checkpoint(folder: Path) -> bool:
    """Return whether a folder is a complete checkpoint of a run; other things are called manifest.json too."""
    known = _FINAL.fullmatch(folder.name) is not None or (folder / "runner.json").exists()
    return known and is_complete(folder)


def _first_damage(folder: Path, contents: Contents, below: str, label: str) -> Damage | None:
    with ProgressBar(label, bytes_to_read(contents, below), least=_BAR_BYTES) as bar:
        return next(changed_files(folder, contents, below, bar.advance), None)


def _below(contents: Contents, below: str) -> dict[str, FileSum]:
    return {name: known for name, known in contents.files.items() if not below or name.startswith(f"{below}/")}


def _advice(folder: Path, below: str, use: str) -> str:
    match = _FINAL.fullmatch(folder.name)
    if match is None:  # it was renamed or moved: which are older is not known
        return "; get it from a copy, or use another one"
    older = [step for step in checkpoint_steps(folder.parent) if step < int(match.group(1))]
    for step in reversed(older):
        other = folder.parent / f"global_step_{step}"
        with suppress(OSError, ValueError):
            if _first_damage(other, _read(other), below, f"looking for an intact one: {other.name}") is None:
                return f"; use {use}{other / below}"
    return "; no older one is intact: get it from a copy, or start again"


HF_FOLDER = "hf"
"""In a model's folder of a checkpoint: its configuration and tokenizer."""


@contextmanager
def new_checkpoint(root: Path, step: int, sums: Mapping[str, FileSum] | None = None) -> Iterator[Path]:
    """Yield a folder to write a checkpoint of `step` into; it gets its final name when the block ends well.

    Args:
        root: the run's folder of checkpoints.
        step: the step.
        sums: those that the block has taken when it ends; the others are taken then.

    Raises:
        UserError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(".partial_step_*"):
            shutil.rmtree(leftover)  # of a run that was killed while saving
        name = f".partial_step_{step}_{os.getpid()}"
        with atomic_folder(root / f"global_step_{step}", durable=True, replace=True, partial_name=name) as partial:
            yield partial
            known = {**(sums or {}), **rank_sums(partial)}
            with ThreadPoolExecutor(1) as pool:  # to read the files and to wait for the disk at once
                synced = pool.submit(sync, [*partial.rglob("*")])
                write_manifest(partial, step, known)
                synced.result()
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else str(error)
        raise UserError(
            f"cannot write a checkpoint below {root}: {reason}; earlier checkpoints are untouched. Free space (or set "
            "runner.keep_checkpoints) and go on with runner.resume_dir=auto"
        ) from error


def prune_checkpoints(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for step in checkpoint_steps(root)[:-keep]:
        shutil.rmtree(root / f"global_step_{step}")
