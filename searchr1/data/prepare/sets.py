"""The seven public sets of Search-R1: where they are and what splits they have."""

from __future__ import annotations

from dataclasses import dataclass

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
        """The stored split that a requested one means; None if there is none."""
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
