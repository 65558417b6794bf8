"""What is told of prepared data: counts per set and split, lengths, and questions asked twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean
from typing import Any

from rich.table import Table

from searchr1.data.prepare.rows import Question
from searchr1.data.prepare.sources import Source
from searchr1.rewards.answers import normalise


@dataclass(slots=True)
class SetStats:
    """One set in one split."""

    set_name: str
    split: str
    origin: str
    published_rows: int | None
    read: int = 0
    bad: int = 0
    duplicates: int = 0
    """Questions that an earlier row of the split asks too; left out with --dedup."""
    overlap: int = 0
    """Training questions that evaluation asks too; left out with --drop-overlap."""
    written: int = 0
    question_words: dict[str, float] = field(default_factory=dict)
    """mean, p95 and max, of the rows written."""
    gold_answers: dict[str, float] = field(default_factory=dict)
    """mean and max per question."""
    yes_no: float = 0.0
    """Share of questions whose gold answer is yes or no."""


def start_stats(source: Source) -> SetStats:
    """Counts of 0 for a file that is about to be read."""
    return SetStats(source.set_name, source.split, source.origin, source.published_rows)


def describe(stats: SetStats, written: Sequence[Question]) -> None:
    """Fill in what is known of the rows that are written."""
    stats.written = len(written)
    if not written:
        return
    words = sorted(len(question.text.split()) for question in written)
    golds = [len(question.answers) for question in written]
    stats.question_words = {
        "mean": round(mean(words), 1),
        "p95": words[min(len(words) - 1, len(words) * 95 // 100)],
        "max": words[-1],
    }
    stats.gold_answers = {"mean": round(mean(golds), 2), "max": max(golds)}
    yes_no = sum(all(normalise(gold) in ("yes", "no") for gold in question.answers) for question in written)
    stats.yes_no = round(yes_no / len(written), 4)


def as_json(found: Sequence[SetStats]) -> list[dict[str, Any]]:
    """For stats.json."""
    return [asdict(stats) for stats in found]


def as_table(found: Sequence[SetStats]) -> Table:
    """For people."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("split")
    table.add_column("set")
    for name in ("read", "bad", "duplicates", "overlap", "written", "words", "golds", "yes/no"):
        table.add_column(name, justify="right")
    for stats in found:
        words, golds = stats.question_words, stats.gold_answers
        table.add_row(
            stats.split,
            stats.set_name,
            *(f"{count:,}" for count in (stats.read, stats.bad, stats.duplicates, stats.overlap, stats.written)),
            f"{words['mean']:.0f} (≤ {words['max']:.0f})" if words else "-",
            f"{golds['mean']:.1f} (≤ {golds['max']:.0f})" if golds else "-",
            f"{stats.yes_no:.0%}",
        )
    return table
