"""What the files of a model's folder must be before any library opens them: one check for every command.

A folder may come from anywhere. The libraries that read it (transformers, safetensors, vLLM, sentence-transformers) meet
pointers of Git LFS, headers that lie and hostile pickles each in its own way, some by taking all memory. What a folder
links to is read like its own files, as the hub's cache is made of links; pipes and devices are no files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from searchr1.checkpoints.safetensors_header import read_header
from searchr1.errors import UserError
from searchr1.lfs import refuse_pointer

ADAPTER = "adapter_config.json"
_MAX_JSON = 64 << 20
_LONG_JSON = ("tokenizer.json", "vocab.json")
"""Read by libraries of their own, which stop at deep ones."""
_BELOW = 2
"""Levels of folders that are looked into: sentence-transformers keeps its layers in some."""


def check_files(source: str | Path) -> None:
    """Refuse a local folder with files that no library should open; a hub name is no folder yet.

    Raises:
        UserError: a Git LFS pointer, a damaged or hostile file, by name, or a model with adapters beside it.
    """
    folder = Path(source)
    if not folder.is_dir():
        return
    for path in _files(folder, _BELOW):
        refuse_pointer(path)
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
