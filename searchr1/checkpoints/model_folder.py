"""A model's folder: what its files must be, the sums of what a conversion wrote, and hashes of weights."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from searchr1.checkpoints.safetensors_header import read_header
from searchr1.errors import UserError
from searchr1.files.checksums import Damage, FileSum, LaterFormat, damaged, read_sums, take_all, write_sums
from searchr1.files.lfs import reject_pointer
from searchr1.progress import Advance, ProgressBar

BLOCK_BYTES = 16 << 20


@functools.cache
def hash_base_model(source: str) -> str:
    """Hash the names and digests of a model's safetensors files; once per process.

    Args:
        source: a folder or hub name.

    Raises:
        UserError: there is no model, or it has no such files.
    """
    from searchr1.checkpoints.hf_folder import local_folder  # brings torch, which a retrieval server may lack

    folder = local_folder(source)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(folder, "LoRA needs the base model's weights in safetensors files, and finds none there")
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            total.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def hash_encoder(path: str) -> str:
    """Hash an encoder's weight files: two folders with the same hash give the same vectors.

    Every byte is read (about a second per GB): a sample would not see the layers that were trained on.

    Raises:
        UserError: there are none.
    """
    folder = Path(path)
    files = sorted(folder.rglob("*.safetensors")) or sorted(folder.rglob("pytorch_model*.bin"))
    if not files:
        raise UserError(f"--retriever_model {path}", "has no weights (model.safetensors or pytorch_model.bin)")
    digest = hashlib.sha256()
    for file in files:
        digest.update(os.fsencode(file.relative_to(folder).as_posix()))
        with file.open("rb") as opened:
            while block := opened.read(BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


ADAPTER = "adapter_config.json"
_MAX_JSON = 64 << 20
_LONG_JSON = ("tokenizer.json", "vocab.json")
"""Read by libraries of their own, which stop at deep ones."""
_BELOW = 2
"""Levels of folders that are looked into: sentence-transformers keeps its layers in some."""


def check_files(source: str | Path) -> None:
    """Reject a local folder with files that no library should open; a hub name is not a folder yet.

    Raises:
        UserError: a Git LFS pointer, a damaged or hostile file, by name, or a model with adapters beside it.
    """
    folder = Path(source)
    if not folder.is_dir():
        return
    for path in _files(folder, _BELOW):
        reject_pointer(path)
        if path.suffix == ".safetensors":
            read_header(path)
        elif path.suffix == ".json" and path.name not in _LONG_JSON:
            _check_json(path)
        elif path.suffix == ".bin" and path.name.startswith("pytorch_model") and not _has_safetensors(path.parent):
            _check_pickle(path)
    if (folder / ADAPTER).is_file() and (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: has LoRA adapters ({ADAPTER}) beside a model, and libraries differ in which they load; merge them "
            "into the model, or move them elsewhere"
        )


def _files(folder: Path, below: int) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if (folder / entry.name).is_file():  # which a link to itself is not
                yield folder / entry.name
            elif below and entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                yield from _files(folder / entry.name, below - 1)


def _has_safetensors(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def _check_json(path: Path) -> None:
    """Parse it, for what would stop others from doing so; plain mistakes are theirs to report."""
    if path.stat().st_size > _MAX_JSON:
        raise UserError(f"{path}: has {path.stat().st_size} bytes, more than a model's settings take; get it again")
    try:
        json.loads(path.read_bytes())
    except RecursionError as error:
        raise UserError(f"{path}: is nested too deeply; get it again") from error
    except (OSError, ValueError):
        return


def _check_pickle(path: Path) -> None:
    from searchr1.checkpoints.torch_files import check_weights

    check_weights(path)


MODEL_SUMS = "checksums.json"
WEIGHTS = (".safetensors", ".distcp", ".metadata", ".pt")
"""Files that nobody edits. Configurations and chat templates are: loading a model does not mind, `searchr1 verify` does."""
BAR_BYTES = 1 << 30


def write_model_sums(folder: Path) -> None:
    """Write the sums of all files below a folder that is complete but for them.

    Raises:
        OSError: a file cannot be read, or the sums not be written.
    """
    (folder / MODEL_SUMS).unlink(missing_ok=True)
    write_sums(folder / MODEL_SUMS, take_all(folder))


def read_model_sums(folder: Path, weights_only: bool = False) -> dict[str, FileSum] | None:
    """Return the sums that lie in a model folder; None if there are none.

    Raises:
        ValueError: they are damaged; the message is a predicate ("has 3 bytes instead of 5").
        OSError: they cannot be read.
    """
    if not (folder / MODEL_SUMS).is_file():
        return None
    files = read_sums(folder / MODEL_SUMS).files
    return {name: known for name, known in files.items() if not weights_only or name.endswith(WEIGHTS)}


def changed_model_files(folder: Path, advance: Advance | None = None, weights_only: bool = False) -> Iterator[Damage]:
    """Yield the files of a model folder that are not what its sums say; none if it has no sums."""
    try:
        sums = read_model_sums(folder, weights_only)
    except ValueError as error:
        yield Damage(folder / MODEL_SUMS, str(error))
    except OSError as error:
        yield Damage(folder / MODEL_SUMS, f"cannot be read ({error.strerror})")
    else:
        yield from damaged(folder, sums or {}, advance=advance)


def verify_weights(source: str | Path) -> None:
    """Compare a local model's weights with the sums beside them, if there are any; once, by one process.

    Args:
        source: a folder, or a hub name, which is left alone.

    Raises:
        UserError: a file is missing or changed.
    """
    folder = Path(source)
    if not folder.is_dir():
        return
    try:
        sums = read_model_sums(folder, weights_only=True) or {}
    except LaterFormat as error:
        raise UserError(f"{folder / MODEL_SUMS} {error}") from error
    except (ValueError, OSError):
        sums = {}  # reported below
    with ProgressBar(f"verifying {folder.name}", sum(known.bytes for known in sums.values()), least=BAR_BYTES) as bar:
        damage = next(changed_model_files(folder, bar.advance, weights_only=True), None)
    if damage is not None:
        raise UserError(
            f"{damage}: the model is damaged; convert or copy it again (if the change is meant, delete {MODEL_SUMS} there)"
        )
