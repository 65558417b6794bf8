"""The seven public sets of Search-R1, and the file that each set and split is read from."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from searchr1.data.reading import SUFFIXES, is_supported
from searchr1.errors import UserError

REPOSITORY = "RUC-NLPIR/FlashRAG_datasets"
"""Dataset repository on the Hugging Face hub: `{set}/{split}.jsonl`."""
EVALUATION_ORDER = ("test", "dev", "train")
"""The first of these that a set has is what Search-R1 evaluates on."""


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """One public set."""

    name: str
    splits: dict[str, int]
    """Rows of each split as published."""

    @property
    def evaluation_split(self) -> str:
        """The split behind `--split test`."""
        return next(split for split in EVALUATION_ORDER if split in self.splits)

    def stored_split(self, split: str) -> str | None:
        """Return the stored split that a requested one means; None if there is none."""
        if split == "test":
            return self.evaluation_split
        return split if split in self.splits else None


SETS = {
    found.name: found
    for found in (
        QuestionSet("nq", {"train": 79_168, "dev": 8_757, "test": 3_610}),
        QuestionSet("triviaqa", {"train": 78_785, "dev": 8_837, "test": 11_313}),
        QuestionSet("popqa", {"test": 14_267}),
        QuestionSet("hotpotqa", {"train": 90_447, "dev": 7_405}),
        QuestionSet("2wikimultihopqa", {"train": 15_000, "dev": 12_576}),
        QuestionSet("musique", {"train": 19_938, "dev": 2_417}),
        QuestionSet("bamboogle", {"test": 125}),
    )
}
DEFAULT_SETS = {"train": ("nq", "hotpotqa"), "dev": ("nq", "hotpotqa"), "test": tuple(SETS)}
"""What Search-R1 trains on, and what it evaluates on."""
SPLITS = tuple(DEFAULT_SETS)


_NAME = re.compile(r"[\w.-]+")

Fetch = Callable[[str], tuple[Path, str]]
"""A file's name in the repository -> where it is here, and at which revision."""


@dataclass(frozen=True, slots=True)
class Input:
    """`--input NAME[:SPLIT]=FILE`."""

    name: str
    split: str | None
    path: Path


@dataclass(frozen=True, slots=True)
class Source:
    """One file of questions."""

    set_name: str
    split: str
    """What the file is prepared as."""
    path: Path
    origin: str
    """For people: the path, or the file's name on the hub with its revision."""
    published_rows: int | None = None


def parse_input(text: str) -> Input:
    """Read one `--input`.

    Raises:
        UserError: not `NAME=FILE` or `NAME:SPLIT=FILE`.
    """
    name, equals, path = text.partition("=")
    name, colon, split = name.partition(":")
    if not equals or not path or not _NAME.fullmatch(name) or (colon and split not in SPLITS):
        raise UserError(f"--input {text}: expected NAME=FILE or NAME:SPLIT=FILE with a split of {', '.join(SPLITS)}")
    return Input(name, split or None, Path(path))


def find_sources(
    sets: Sequence[str] | None, splits: Sequence[str], inputs: Sequence[Input], local: Path | None, fetch: Fetch
) -> dict[str, list[Source]]:
    """Return the files of every requested split, in the order in which their rows are written.

    A file given with `--input` takes the place of a public set of the same name; the others follow the sets. Without
    `sets` and `inputs`, Search-R1's own choice for the split is taken.

    Raises:
        UserError: an unknown set, a split that a set does not have, a file that is missing.
    """
    unknown = [name for name in sets or () if name not in SETS and all(found.name != name for found in inputs)]
    if unknown:
        raise UserError(
            f"--sets {unknown[0]}: is not known; use {', '.join(SETS)}, or give a file of your own with "
            f"--input {unknown[0]}=FILE"
        )
    given = _by_split(inputs, splits)
    found: dict[str, list[Source]] = {}
    for split in splits:
        own = given[split]
        names = list(sets) if sets is not None else [] if inputs else list(DEFAULT_SETS[split])
        names += [name for name in own if name not in names]
        _require_split(names, split, own)
        found[split] = [
            Source(name, split, own[name], str(own[name])) if name in own else _public(name, split, local, fetch)
            for name in names
        ]
    return found


def _by_split(inputs: Sequence[Input], splits: Sequence[str]) -> dict[str, dict[str, Path]]:
    given: dict[str, dict[str, Path]] = {split: {} for split in splits}
    for found in inputs:
        if found.split is None and len(splits) > 1:
            raise UserError(
                f"--input {found.name}={found.path}: which split is it? write {found.name}:{splits[0]}={found.path}"
            )
        split = found.split or splits[0]
        if split not in given:
            raise UserError(f"--input {found.name}:{split}={found.path}: {split} is not asked for; add it to --split")
        if found.name in given[split]:
            raise UserError(f"--input {found.name}: names two files for {split}; join them, or give them two names")
        if not found.path.is_file():
            raise UserError(f"--input {found.name}={found.path}: no such file")
        if not is_supported(found.path):
            raise UserError(f"--input {found.name}={found.path}: expected one of {', '.join(SUFFIXES)}")
        given[split][found.name] = found.path
    return given


def _require_split(names: Sequence[str], split: str, own: dict[str, Path]) -> None:
    if not names:
        raise UserError(f"--split {split}: no file is given for it; add --input NAME:{split}=FILE, or --sets")
    for name in names:
        if name in own:
            continue
        if name not in SETS:
            raise UserError(f"--sets {name}: has no file for {split}; add --input {name}:{split}=FILE")
        if SETS[name].stored_split(split) is None:
            has = [known for known in SPLITS if known in SETS[name].splits]
            others = [known.name for known in SETS.values() if split in known.splits]
            raise UserError(
                f"--sets {name}: has no {split} split, only {', '.join(has)}; sets with one: {', '.join(others)}. "
                "Leave it out, or prepare the splits in two runs"
            )


def _public(name: str, split: str, local: Path | None, fetch: Fetch) -> Source:
    known = SETS[name]
    stored = known.stored_split(split)
    assert stored is not None  # _require_split
    if local is None:
        path, revision = fetch(f"{name}/{stored}.jsonl")
        return Source(name, split, path, f"{REPOSITORY}@{revision[:12]} {name}/{stored}.jsonl", known.splits[stored])
    for suffix in SUFFIXES:
        path = local / name / f"{stored}{suffix}"
        if path.is_file():
            return Source(name, split, path, str(path), known.splits[stored])
    raise UserError(
        f"--local {local}: has no {name}/{stored}.jsonl; it must be laid out like {REPOSITORY} on the hub: SET/SPLIT.jsonl "
        f"(or one of {', '.join(SUFFIXES[1:])})"
    )
