"""A row of any of the known shapes -> a checked question."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from searchr1.data.dataset import question_in, require_unicode
from searchr1.errors import UserError

QUESTION_KEYS = ("question", "Question", "query")
ANSWER_KEYS = ("golden_answers", "solutions", "answers", "possible_answers", "answer", "Answer", "target")
ID_KEYS = ("id", "_id", "question_id", "QuestionId", "qid")
ALIAS_KEYS = ("value", "Value", "aliases", "Aliases", "target", "text")
"""Where an answer that is an object keeps its texts (TriviaQA, Search-R1, SQuAD)."""
QUESTION_MARKS = ("?", "？")
_LIST_AS_TEXT = re.compile(r"\s*\[\s*['\"].*\]\s*", re.DOTALL)
"""A cell of a table that was made from a list: as an answer it would never match."""


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
    reward = reward if isinstance(reward, str) and reward else None
    question = Question(set_name, index, _id(row, default_id), text, _answers(row), passages, reward)
    for part in (question.id, question.text, *question.answers, passages or "", reward or ""):
        require_unicode(part)
    return question


def _question(row: dict[str, Any]) -> str:
    for key in QUESTION_KEYS:
        value = row.get(key)
        if value is None:
            continue
        if not isinstance(value, str):
            raise UserError(f"{key} is a {type(value).__name__}; expected a text")
        if not value.strip():
            raise UserError("the question is empty")
        return value.strip()
    text = _question_of_prompt(row.get("prompt"))
    if text is None:
        raise UserError("the row has no question; give it under the key question")
    if not text:
        raise UserError("the question is empty")
    return text


def _question_of_prompt(prompt: object) -> str | None:
    if isinstance(prompt, str):
        return question_in(prompt, prompt)
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict) and isinstance(prompt[-1].get("content"), str):
        return question_in(prompt, "")
    return None


def _id(row: dict[str, Any], default: str) -> str:
    value = next((row[key] for key in ID_KEYS if row.get(key) is not None), default)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UserError(f"the id is a {type(value).__name__}; expected a text or a whole number")
    text = str(value).strip()
    if not text:
        raise UserError("the id is empty")
    return text


def _answers(row: dict[str, Any]) -> list[str]:
    """The texts of the first key that holds any, then MuSiQue's aliases; none twice, none blank."""
    reward = row.get("reward_model")
    truth = reward.get("ground_truth") if isinstance(reward, dict) else None
    for name, value in (*((key, row.get(key)) for key in ANSWER_KEYS), ("reward_model.ground_truth", truth)):
        found = _texts(name, value)
        if found:
            return list(dict.fromkeys([*found, *_texts("answer_aliases", row.get("answer_aliases"))]))
    raise UserError("the row has no gold answer; give a list of texts under the key golden_answers")


def _texts(name: str, value: object) -> list[str]:
    if isinstance(value, str) and (name == "possible_answers" or _LIST_AS_TEXT.fullmatch(value)):
        try:
            value = json.loads(value)  # a column of text, as PopQA's and those of csv files
        except ValueError as error:
            raise UserError(f'{name} is not valid JSON ({error}); write several answers as ["one", "two"]') from error
    if isinstance(value, dict):
        return [text for key in ALIAS_KEYS for text in _texts(f"{name}.{key}", value.get(key))]
    values = value if isinstance(value, list) else [value] if value is not None else []
    return [text for item in values if (text := _text(name, item)).strip()]


def _text(name: str, value: object) -> str:
    if isinstance(value, str):
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or (isinstance(value, float) and not math.isfinite(value)):
        shown = "null" if value is None else repr(value)[:40]
        raise UserError(f"{name} holds {shown}; expected texts")
    return str(value)
