"""Rows of any of the known shapes -> checked questions -> rows in the shapes that Search-R1, RLinf and FlashRAG read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from searchr1.data.golds import column_names, no_gold, object_in, read_golds
from searchr1.data.prompts import fill_template, render_prompt, wants_passages
from searchr1.data.questions import QUESTION_KEYS, question_of_row, require_unicode
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
    text = question_of_row(row)
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


ROW_SHAPES = ("searchr1", "rlinf", "plain")


def make_row(
    question: Question,
    shape: str,
    split: str,
    template: str | None,
    passages: str | None = None,
    *,
    messages: bool = False,
    tokenizer: Any = None,
) -> dict[str, Any]:
    """Return one output row. `data.dataset` reads all three shapes.

    Args:
        question: what is asked.
        shape: one of `ROW_SHAPES`.
        split: `extra_info.split`.
        template: see `data.prompts`; None only for plain rows.
        passages: what the search found; put into the prompt, or beside the question in a plain row.
        messages: "rlinf": the prompt as chat messages.
        tokenizer: "rlinf": render the prompt with its chat template.
    """
    if shape == "plain":
        row: dict[str, Any] = {"id": question.id, "data_source": question.set_name, "question": question.text}
        row["golden_answers"] = question.answers
        return row | _own_reward(question) | ({} if passages is None else {"passages": passages})
    assert template is not None
    text = fill_template(template, question.text, passages if wants_passages(template) else None)
    if shape == "searchr1":
        return {
            "id": question.id,
            "question": question.text,
            "golden_answers": question.answers,
            "data_source": question.set_name,
            "prompt": [{"role": "user", "content": text}],
            "ability": "fact-reasoning",
            "reward_model": {"style": "rule", "ground_truth": {"target": question.answers}},
            "extra_info": {"split": split, "index": question.index},
        }
    prompt: Any = text
    if messages:
        prompt = [{"role": "user", "content": text}]
    elif tokenizer is not None:
        prompt = render_prompt(text, None, tokenizer, None, chat=True)
    return {
        "prompt": prompt,
        "solutions": question.answers,
        "id": question.id,
        "question": question.text,
        "data_source": question.set_name,
        **_own_reward(question),
    }


def _own_reward(question: Question) -> dict[str, Any]:
    return {} if question.reward is None else {"reward_model": question.reward}


def arrow_schema(shape: str, *, passages: bool = False, messages: bool = False, own_reward: bool = False) -> Any:
    """Return the columns of `make_row`'s rows; fixed, so that a file's types do not hang on what its first rows hold."""
    import pyarrow as pa

    text, texts = pa.string(), pa.list_(pa.string())
    further = {"reward_model": text} if own_reward else {}
    chat = pa.list_(pa.struct({"role": text, "content": text}))
    if shape == "plain":
        columns = {"id": text, "data_source": text, "question": text, "golden_answers": texts}
        return pa.schema(columns | further | ({"passages": text} if passages else {}))
    if shape == "rlinf":
        prompt = chat if messages else text
        columns = {"prompt": prompt, "solutions": texts, "id": text, "question": text, "data_source": text}
        return pa.schema(columns | further)
    return pa.schema(
        {
            "id": text,
            "question": text,
            "golden_answers": texts,
            "data_source": text,
            "prompt": chat,
            "ability": text,
            "reward_model": pa.struct({"style": text, "ground_truth": pa.struct({"target": texts})}),
            "extra_info": pa.struct({"split": text, "index": pa.int64()}),
        }
    )
