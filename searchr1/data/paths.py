"""What stands in `data.train_data_paths` and the like: a file, or a data set of the Hugging Face hub."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from searchr1.data.reading import SUFFIXES, bare_name, file_format

TRAIN, EVALUATION = ("train",), ("test", "validation")
"""The split that a hub id without one means: the first of these that the data set has."""
PREFIX = "hf://datasets/"
SYNTAX = "OWNER/NAME:SPLIT or OWNER/NAME/FILE (@REVISION after NAME, if you want a certain one)"
_HUB = re.compile(
    rf"(?P<prefix>{PREFIX})?(?P<owner>\w[\w.-]*)/(?P<name>\w[\w.-]*)(?:@(?P<revision>[\w.-]+))?"
    r"(?::(?P<split>[\w.-]+)|/(?P<file>[^:]+))?"
)


@dataclass(frozen=True, slots=True)
class HubId:
    """A data set of the hub, one of its splits, or one of its files."""

    repository: str
    revision: str | None
    split: str | None
    file: str | None


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of rows, here."""

    path: Path
    name: PurePosixPath
    """Where it comes from: the path, or its place on the hub; its rows are named after it."""


def parse_hub_id(text: str) -> HubId | None:
    """Read `OWNER/NAME`, `OWNER/NAME:SPLIT` or `OWNER/NAME/FILE`; None for what is, or can only be, a path on this machine.

    A path goes first where both are possible: something exists there, or its first folder does.
    """
    found = _HUB.fullmatch(text)
    if found is None:
        return None
    owner, name, file = found["owner"], found["name"], found["file"]
    if file is not None and (file_format(file) is None or ".." in file.split("/")):
        return None
    if not found["prefix"]:
        local = Path(text).exists() or (found["split"] is None and found["revision"] is None and Path(owner).is_dir())
        bare_file = file is None and found["split"] is None and file_format(name) is not None
        if local or bare_file:
            return None
    return HubId(f"{owner}/{name}", found["revision"], found["split"], file)


def path_problem(text: str) -> str | None:
    """Return what is wrong with a path, as far as it can be known without a connection; None if nothing is."""
    if parse_hub_id(text) is not None:
        return None
    path = Path(text)
    if path.is_dir():
        return f"{text} is a folder; name the files in it"
    if not path.is_file():
        return f"{text} does not exist; edit the path (a data set of the hub is {SYNTAX})"
    if file_format(path.name) is None:
        return f"{text} has a name of no known format; expected one of {', '.join(SUFFIXES)} (but for parquet also with .gz)"
    return None


def find_files(paths: Sequence[str | Path], splits: Sequence[str]) -> list[DataFile]:
    """Return the files behind the paths, in order; those of the hub are downloaded, or taken from its cache.

    Args:
        paths: files, or ids of the hub.
        splits: what a hub id without a split means, `TRAIN` or `EVALUATION`.

    Raises:
        UserError: the hub cannot be reached, or does not have it.
    """
    files: list[DataFile] = []
    for text in map(str, paths):
        hub = parse_hub_id(text)
        if hub is None:
            files.append(DataFile(Path(text), PurePosixPath(Path(text).absolute())))
            continue
        from searchr1.data.prepare.hub import fetch_data_set  # here: most runs need no hub

        files += [
            DataFile(path, PurePosixPath(hub.repository) / name)
            for name, path in fetch_data_set(hub.repository, hub.revision, hub.file, hub.split, splits)
        ]
    return files


def source_names(files: Sequence[DataFile]) -> list[str]:
    """Return a name for each file: the file's own without suffixes; where others have the same, with as many folders
    before it as
    it takes to tell them apart (or, in the same folder, with its suffix)."""
    alike: dict[str, set[DataFile]] = defaultdict(set)
    for file in files:
        alike[_name(file, 0)].add(file)
    names: dict[DataFile, str] = {}
    for group in alike.values():
        deepest = max(len(file.name.parts) for file in group)
        candidates = [{file: _name(file, depth) for file in group} for depth in range(deepest)]
        candidates += [{file: file.name.name for file in group}, {file: str(file.name) for file in group}]
        names |= next(found for found in candidates if len(set(found.values())) == len({file.name for file in group}))
    return [names[file] for file in files]


def _name(file: DataFile, folders: int) -> str:
    before = file.name.parent.parts[-folders:] if folders else ()
    return "/".join([*(part.strip("/") for part in before if part.strip("/")), bare_name(Path(file.name.name))])
