"""Files of the Hugging Face hub, kept in its cache; a download that was cut off goes on where it stopped."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from searchr1.data.prepare.sources import REPOSITORY
from searchr1.data.reading import file_format
from searchr1.errors import UserError

ANSWER_WITHIN_S = 15
SPELLINGS = {"train": ("training",), "test": ("testing", "eval", "evaluation"), "validation": ("valid", "val", "dev")}
"""Other names of splits, as the hub knows them."""
ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that describe rows and hold none."""
OTHERWISE = "download the file by other means and give its path"
_SHARD = re.compile(r"(?P<stem>.*?)-(?P<number>\d{3,6})-of-(?P<total>\d{3,6})")


def fetch(
    name: str, revision: str | None = None, repository: str = REPOSITORY, flag: str = "--revision", otherwise: str = ""
) -> tuple[Path, str]:
    """Return a file of a data set, and the commit it belongs to. One that is cached is not fetched again; without a
    connection it
    is taken as it is.

    Args:
        name: of the file, in the repository.
        revision: branch, tag or commit.
        repository: `OWNER/NAME`.
        flag: how the user gives a revision, for messages.
        otherwise: what the user can do without the hub.

    Raises:
        UserError: no such file or revision, no connection and nothing cached, no space.
    """
    from huggingface_hub import errors as hub
    from huggingface_hub import hf_hub_download

    otherwise = otherwise or "copy the repository here by other means and give its folder with --local"
    try:
        path = Path(hf_hub_download(repository, name, repo_type="dataset", revision=revision, etag_timeout=ANSWER_WITHIN_S))
    except hub.LocalEntryNotFoundError as error:  # an EntryNotFoundError too
        raise UserError(
            f"{repository} {name}: cannot be downloaded and is not in the cache ({_reason(error)}). Check the connection "
            "(HF_ENDPOINT names a mirror, HF_HUB_OFFLINE must not be set) and run this again: what is complete is kept. Or "
            f"{otherwise}"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise UserError(f"{flag} {revision}: {repository} has no such revision") from error
    except hub.RepositoryNotFoundError as error:
        raise _no_repository(repository) from error
    except hub.EntryNotFoundError as error:
        raise UserError(
            f"{repository} has no {name}; it may have been renamed on the hub. Give an older revision with {flag}, or a "
            "file of your own"
        ) from error
    except Exception as error:  # what the library raises differs by version: connection, time-out, disk, access
        raise UserError(
            f"{repository} {name}: the download failed ({_reason(error)}). Check the connection and the free space, then "
            "run this again: it goes on where it stopped"
        ) from error
    return path, path.parents[len(Path(name).parts) - 1].name  # …/snapshots/COMMIT/name


def fetch_data_set(
    repository: str, revision: str | None, file: str | None, split: str | None, splits: Sequence[str]
) -> list[tuple[str, Path]]:
    """Return the files of one split of a data set, or one file: each with its name on the hub and where it is here.

    Args:
        repository: `OWNER/NAME`.
        revision: branch, tag or commit.
        file: this file alone.
        split: this split; None takes the first of `splits` that the data set has, or its only one.
        splits: see there.

    Raises:
        UserError: no such data set, split or file, or several that it could be; no connection and nothing cached.
    """
    names = [file]
    if file is None:
        revision, every = _files_of(repository, revision)
        names = list(split_files(repository, every, [split] if split is not None else splits, only=split is None))
    more = {"repository": repository, "flag": f"{repository}@REVISION", "otherwise": OTHERWISE}
    return [(name, fetch(name, revision, **more)[0]) for name in names if name is not None]


def split_files(repository: str, names: Iterable[str], splits: Sequence[str], only: bool) -> list[str]:
    """Return the files of a split, by their names: `train.jsonl`, `data/train-00000-of-00002.parquet`, `train/0000.parquet`.

    Args:
        repository: for messages.
        names: every file of the data set.
        splits: the first that there are files for is taken.
        only: take all files if they can only be one split.

    Raises:
        UserError: none, or several that it could be; a part is missing.
    """
    rows = [name for name in names if file_format(name) and PurePosixPath(name).name not in ABOUT and name[0] != "."]
    if not rows:
        raise UserError(
            f"{repository}: has no file of rows that can be read; name a data set with jsonl, parquet, json or csv"
        )
    for split in splits:
        for spelling in (split, *SPELLINGS.get(split, ())):
            for matches in (_is_split, _names_split):
                found = [name for name in rows if matches(name, spelling)]
                if found:
                    return _one_set(repository, found, split)
    if only and len({_set_of(name) for name in rows}) == 1:
        return _one_set(repository, rows, "")
    shown = ", ".join(sorted(rows)[:8]) + (", …" if len(rows) > 8 else "")
    raise UserError(
        f"{repository}: has no split {' or '.join(splits)}; its files are {shown}; write {repository}:SPLIT or "
        f"{repository}/FILE"
    )


def _is_split(name: str, split: str) -> bool:
    """Return whether the file's name, or a folder's, is the split's."""
    return split in (_stem(name), *PurePosixPath(name).parent.parts)


def _names_split(name: str, split: str) -> bool:
    """Return whether the split is a word of the file's name."""
    return split in re.split(r"[-_. ]", _stem(name))


def _stem(name: str) -> str:
    stem = PurePosixPath(name).name.removesuffix(".gz").removesuffix(file_format(name) or "")
    shard = _SHARD.fullmatch(stem)
    return shard["stem"] if shard else stem


def _set_of(name: str) -> tuple[str, str, str]:
    """Return a key that is equal for the parts of one set of rows."""
    stem = _stem(name)
    return str(PurePosixPath(name).parent), "" if stem.isdigit() else stem, file_format(name) or ""


def _one_set(repository: str, names: list[str], split: str) -> list[str]:
    sets: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for name in sorted(names):
        sets[_set_of(name)].append(name)
    if len(sets) > 1:
        shown = ", ".join(f"{repository}/{files[0]}" for files in list(sets.values())[:8])
        raise UserError(f"{repository}: has several files for {split or 'its rows'}; name the one that is meant: {shown}")
    shards = [found for name in names if (found := _SHARD.fullmatch(_plain(name)))]
    if shards and len({found["number"] for found in shards}) != int(shards[0]["total"]):
        raise UserError(
            f"{repository}: only {len(shards)} of {int(shards[0]['total'])} parts of {split or 'it'} are there; fetch "
            "the rest with a connection"
        )
    return sorted(names)


def _plain(name: str) -> str:
    return PurePosixPath(name).name.removesuffix(".gz").removesuffix(file_format(name) or "")


def _files_of(repository: str, revision: str | None) -> tuple[str | None, list[str]]:
    """Return the commit, and the names of all files in it; without a connection those in the cache."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().dataset_info(repository, revision=revision, timeout=ANSWER_WITHIN_S)
        return info.sha or revision, [entry.rfilename for entry in info.siblings or ()]
    except RevisionNotFoundError as error:
        raise UserError(f"{repository}@{revision}: the data set has no such revision") from error
    except RepositoryNotFoundError as error:
        raise _no_repository(repository) from error
    except Exception as error:  # no connection, or none is wanted
        try:
            folder = Path(snapshot_download(repository, repo_type="dataset", revision=revision, local_files_only=True))
        except Exception:  # nothing cached
            raise UserError(
                f"{repository}: the hub cannot be asked for its files, and none are in the cache ({_reason(error)}). Check "
                "the connection (HF_ENDPOINT names a mirror, HF_HUB_OFFLINE must not be set), or " + OTHERWISE
            ) from error
        return folder.name, [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _no_repository(repository: str) -> UserError:
    return UserError(
        f"{repository}: neither a file here nor a data set on the hub (or a private one: set HF_TOKEN); edit the path"
    )


def _reason(error: BaseException) -> str:
    cause = error.__cause__ or error
    text = str(cause).strip().partition("\n")[0] or type(cause).__name__
    return text.rstrip(".")
