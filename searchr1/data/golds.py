"""The gold answers of a row: read as they are meant whatever type they have, or rejected; nothing becomes one by `str()`."""

from __future__ import annotations

import ast
import io
import json
import math
import re
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from searchr1.errors import UserError

TRUTH_KEYS = ("reward_model", "reward_spec")
"""Objects of verl's and Search-R1's, and of SkyRL's rows; their `ground_truth` holds the gold answers."""
ANSWER_KEYS = (
    "solutions", "golden_answers", "answers", "possible_answers", "answer", "Answer", "target", "gold_answers",
    "ground_truth", "solution", "label",
)  # fmt: skip
"""Tried in this order after `data.answer_key` and `TRUTH_KEYS`."""
JSON_KEYS = ("possible_answers",)
"""Columns that hold JSON as text in the set's own form (PopQA)."""
TARGET_KEYS = ("target", "ground_truth")
"""Where an object keeps its gold answers: the first of these, or else all of `ALIAS_KEYS` together."""
ALIAS_KEYS = ("value", "Value", "aliases", "Aliases", "text")
"""TriviaQA, SQuAD."""
MAX_LITERAL = 200_000
MOST_COLUMNS = 20
"""Columns that a message names."""
_BRACKETS = {"[": "]", "(": ")", "{": "}"}
_QUOTED_LIST = re.compile(r"\[\s*['\"].*['\"]\s*\]|array\(\s*\[.*\)", re.DOTALL)
"""A list of quoted texts, or a printed numpy array: never meant as an answer."""


@dataclass(slots=True)
class Golds:
    """What a row gives as right answers."""

    texts: list[str]
    """At least one; none blank."""
    column: str
    left_out: int = 0
    """Null, NaN and blank items of the list."""
    contradicted_by: str | None = None
    """Another column with gold answers that shares none of these."""

    def notes(self) -> list[str]:
        """Return what a user should see of the rows."""
        found = []
        if self.left_out:
            found.append(f"have null, NaN or blank items among the gold answers in {self.column}; they are left out")
        if self.contradicted_by is not None:
            found.append(f"have other gold answers in {self.contradicted_by} than in {self.column}; {self.column} is used")
        return found


def read_golds(row: dict[str, Any], answer_key: str | None = None) -> Golds | None:
    """Read the first column that holds a gold answer, with MuSiQue's aliases; None if no column does.

    Null, NaN, a blank text, an empty list and an empty object are missing values.

    Args:
        row: as it stands in the file.
        answer_key: the column that is asked before all others.

    Raises:
        UserError: a value that cannot be read as texts.
    """
    found: Golds | None = None
    for column, value in _columns(row, answer_key):
        if found is None:
            texts, left_out = _texts(column, value)
            if texts:
                found = Golds(texts, column, left_out)
        elif found.contradicted_by is None and _contradicts(column, value, found.texts):
            found.contradicted_by = column
    if found is not None:
        aliases, left_out = _texts("answer_aliases", row.get("answer_aliases"))
        found.texts += [text for text in aliases if text not in found.texts]
        found.left_out += left_out
    return found


def no_gold(row: dict[str, Any], answer_key: str | None, advice: str) -> UserError:
    """Return the error for a row without a gold answer, with the columns that it has and what to do."""
    values = ", ".join(f"{column} is {shown(value)}" for column, value in _columns(row, answer_key))
    return UserError(
        f"the row has no gold answer{f' ({values})' if values else ''}; its columns are {column_names(row)}; {advice}"
    )


def is_missing(value: object) -> bool:
    """Return whether a value stands for none: null, NaN, a blank text."""
    return (
        value is None or (isinstance(value, float) and math.isnan(value)) or (isinstance(value, str) and not value.strip())
    )


def shown(value: object) -> str:
    """Format a value for a message."""
    text = "null" if value is None else "NaN" if isinstance(value, float) and math.isnan(value) else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def column_names(row: dict[str, Any]) -> str:
    """Format a row's columns for a message: on one line, and not all of very many or very long ones."""
    names = [repr(str(name))[1:-1] for name in row]
    cut = [name if len(name) <= 40 else f"{name[:37]}..." for name in names[:MOST_COLUMNS]]
    return ", ".join([*cut, *([f"and {len(names) - len(cut)} more"] if len(names) > len(cut) else [])]) or "none"


def object_in(value: object) -> object:
    """Parse a list or an object that a text holds as JSON or as a Python literal; return any other value as it is."""
    if not isinstance(value, str):
        return value
    found = _literal(value)
    return found if isinstance(found, dict | list) else value


def _columns(row: dict[str, Any], answer_key: str | None) -> Iterator[tuple[str, object]]:
    """Yield names and values of the columns that a row has, each once."""
    if answer_key is not None and answer_key in row:
        yield answer_key, row[answer_key]
    for key in TRUTH_KEYS:
        spec = object_in(row.get(key))
        if isinstance(spec, dict) and "ground_truth" in spec:
            yield f"{key}.ground_truth", spec["ground_truth"]
    for key in ANSWER_KEYS:
        if key in row and key != answer_key:
            yield key, row[key]


def _contradicts(column: str, value: object, texts: list[str]) -> bool:
    try:
        others, _ = _texts(column, value)
    except UserError:
        return False  # It is not used, so it need not be readable.
    known = {text.strip().casefold() for text in texts}
    return bool(others) and known.isdisjoint(text.strip().casefold() for text in others)


def _texts(column: str, value: object) -> tuple[list[str], int]:
    """Return the texts, and how many items of a list were missing values."""
    if isinstance(value, str):
        value = _read_text(column, value)
    if isinstance(value, dict):
        return _of_object(column, value)
    if not isinstance(value, list):
        return ([] if is_missing(value) else [_scalar(column, value)]), 0
    for item in value:
        if isinstance(item, list) or (isinstance(item, str) and isinstance(_read_text("", item), list)):
            raise UserError(f"{column}: holds a list inside a list; write one flat list of texts")
    texts = [_scalar(column, item) for item in value if not is_missing(item)]
    return texts, len(value) - len(texts)


def _of_object(column: str, value: dict[str, Any]) -> tuple[list[str], int]:
    for key in TARGET_KEYS:
        if key in value and value[key] is not None:
            return _texts(f"{column}.{key}", value[key])
    known = [key for key in ALIAS_KEYS if key in value]
    if value and not known and not any(key in value for key in TARGET_KEYS):
        names = ", ".join(map(str, value))
        raise UserError(
            f"{column}: is an object with the keys {names}; write a text, a list of texts, or an object with "
            f"{', '.join((*TARGET_KEYS, *ALIAS_KEYS))}"
        )
    found = [_texts(f"{column}.{key}", value[key]) for key in known]
    return [text for texts, _ in found for text in texts], sum(count for _, count in found)


def _scalar(column: str, value: object) -> str:
    if isinstance(value, str):
        return value
    number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    if not number or not math.isfinite(value):  # type: ignore[arg-type]
        kind = "a truth value" if isinstance(value, bool) else f"of type {type(value).__name__}"
        raise UserError(f"{column}: holds {shown(value)}, which is {kind}; write the text that counts as right")
    text = format(Decimal(repr(value)) if isinstance(value, float) else Decimal(value), "f")  # type: ignore[arg-type]
    # A column of whole numbers with a gap is stored as floats: 1998.0 is meant as 1998.
    return text.rstrip("0").rstrip(".") if "." in text else text


def _read_text(column: str, text: str) -> object:
    """Return a text as it is, or the list or object that was written as this text.

    Raises:
        UserError: it looks like a list of texts, but cannot be read as one.
    """
    found = _literal(text)
    if isinstance(found, dict):
        return found
    if isinstance(found, list) and (column in JSON_KEYS or not found or any(isinstance(item, str) for item in found)):
        return found
    if column in JSON_KEYS and text.strip():
        raise UserError(f'{column}: is not a valid JSON list; write several answers as ["one", "two"]')
    if found is None and _QUOTED_LIST.fullmatch(text.strip()):
        raise UserError(f'{column}: {shown(text)} looks like a list, but is none; write several answers as ["one", "two"]')
    return text


def _literal(text: str) -> object:
    """Return the value of a text that is a JSON or Python list, tuple, set or object; None if it is neither."""
    text = text.strip()
    if len(text) < 2 or len(text) > MAX_LITERAL or _BRACKETS.get(text[0]) != text[-1]:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    if isinstance(found, set):
        found = sorted(found, key=str)
    if isinstance(found, tuple):
        found = list(found)
    if isinstance(found, list) and _strings(text) > sum(isinstance(item, str) for item in found):
        return None  # Texts without commas between them, as numpy prints them: Python would join them.
    return found if isinstance(found, list | dict) else None


def _strings(text: str) -> int:
    """Count the string literals that Python sees."""
    try:
        return sum(token.type == tokenize.STRING for token in tokenize.generate_tokens(io.StringIO(text).readline))
    except (tokenize.TokenError, IndentationError):
        return 0
