"""Counts and lengths of prepared data, and questions that are asked twice."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean
from typing import Any

from rich.table import Table

from searchr1.data.prepare.rows import Question
from searchr1.data.prepare.sources import Source
from searchr1.rewards.answers import normalise

EXAMPLES = 5


def question_key(text: str) -> bytes:
    """Return a key that ignores case, punctuation, articles, blanks and the form of characters."""
    folded = normalise(unicodedata.normalize("NFKC", text).casefold())
    # A question of nothing but punctuation has only itself.
    return hashlib.blake2b((folded or text).encode(), digest_size=16).digest()


def split_duplicates(questions: Iterable[Question]) -> tuple[list[Question], list[tuple[Question, Question]]]:
    """Return questions asked for the first time, in order, and every repetition with its first."""
    first: dict[bytes, Question] = {}
    repeated = []
    for question in questions:
        known = first.setdefault(question_key(question.text), question)
        if known is not question:
            repeated.append((question, known))
    return list(first.values()), repeated


@dataclass(slots=True)
class Overlap:
    """Training questions that evaluation asks too."""

    questions: list[Question] = field(default_factory=list)
    pairs: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By training set and by where evaluation has it."""
    examples: list[tuple[str, str, str]] = field(default_factory=list)
    """Training row, evaluation row, question."""


def find_overlap(train: Sequence[Question], evaluation: Iterable[tuple[str, str, str]]) -> Overlap:
    """Compare training questions with evaluation rows, given as (set, name of the row, question)."""
    asked: dict[bytes, tuple[str, str]] = {}
    for set_name, row, text in evaluation:
        asked.setdefault(question_key(text), (set_name, row))
    overlap = Overlap()
    for question in train:
        found = asked.get(question_key(question.text))
        if found is None:
            continue
        overlap.questions.append(question)
        overlap.pairs[question.set_name, found[0]] += 1
        if len(overlap.examples) < EXAMPLES:
            overlap.examples.append((f"{question.set_name}/{question.id}", found[1], question.text))
    return overlap


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
    """Start counting for a file that is about to be read."""
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
