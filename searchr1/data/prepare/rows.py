"""A row of any of the known shapes -> a checked question."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from searchr1.data.dataset import read_prompt, require_unicode
from searchr1.data.golds import column_names, no_gold, object_in, read_golds
from searchr1.data.questions import QUESTION_KEYS, question_column, question_of_prompt
from searchr1.errors import UserError

ID_KEYS = ("id", "_id", "question_id", "QuestionId", "qid")
QUESTION_MARKS = ("?", "？")


@dataclass(frozen=True, slots=True)
class Question:
    """One checked row."""

    set_name: str
    index: int
    """Position in its file, from 0; bad rows count too."""
    id: str
    text: str
    answers: list[str]
    passages: str | None = None
    """Search results as text, if the row came with them."""
    reward: str | None = None
    """The row's own reward, by name."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What a user should see of the row."""


def check_row(row: dict[str, Any], set_name: str, index: int, default_id: str, question_mark: bool) -> Question:
    """Read FlashRAG's, Search-R1's, RLinf's and the sets' original rows.

    Args:
        row: as it stands in the file.
        set_name: becomes `data_source`.
        index: position in the file.
        default_id: for a row without one.
        question_mark: end the question in one, as Search-R1 does.

    Raises:
        UserError: no or a blank question, no gold answer, a wrong type, half a surrogate pair, an unanswerable question.
    """
    text = _question(row)
    if question_mark and not text.endswith(QUESTION_MARKS):
        text += "?"
    if row.get("answerable") is False:
        raise UserError("the question is marked as not answerable")
    passages = row.get("passages")
    if passages is not None and not isinstance(passages, str):
        raise UserError(f"passages is a {type(passages).__name__}; expected one text")
    reward = row.get("reward_model")
    reward = reward if isinstance(reward, str) and reward and reward is object_in(reward) else None
    golds = read_golds(row)
    if golds is None:
        raise no_gold(row, None, "give a list of texts under the key golden_answers")
    answers = list(dict.fromkeys(golds.texts))
    question = Question(set_name, index, _id(row, default_id), text, answers, passages, reward, tuple(golds.notes()))
    for part in (question.id, question.text, *question.answers, passages or "", reward or ""):
        require_unicode(part)
    return question


def _question(row: dict[str, Any]) -> str:
    text = question_column(row)
    if text is None:
        prompt = row.get("prompt")
        text = question_of_prompt(read_prompt(prompt, "prompt"))
    if text is None and all(row.get(key) is None for key in QUESTION_KEYS):
        raise UserError(f"the row has no question; its columns are {column_names(row)}; give it under the key question")
    if not text:
        raise UserError("the question is empty")
    return text.strip()


def _id(row: dict[str, Any], default: str) -> str:
    value = next((row[key] for key in ID_KEYS if row.get(key) is not None), default)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UserError(f"the id is a {type(value).__name__}; expected a text or a whole number")
    text = str(value).strip()
    if not text:
        raise UserError("the id is empty")
    return text
