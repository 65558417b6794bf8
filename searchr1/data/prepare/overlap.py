"""Questions that are asked twice: within a split, and in training as well as in evaluation."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from searchr1.data.prepare.rows import Question
from searchr1.rewards.answers import normalise

EXAMPLES = 5


def question_key(text: str) -> bytes:
    """Equal for questions that differ only in case, punctuation, articles, blanks or the form of their characters."""
    folded = normalise(unicodedata.normalize("NFKC", text).casefold())
    # A question of nothing but punctuation has only itself.
    return hashlib.blake2b((folded or text).encode(), digest_size=16).digest()


def split_duplicates(questions: Iterable[Question]) -> tuple[list[Question], list[tuple[Question, Question]]]:
    """First askings in order, and every later asking with its first."""
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
