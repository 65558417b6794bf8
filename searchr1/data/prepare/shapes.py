"""Checked questions -> rows in the shapes that Search-R1, RLinf and FlashRAG read."""

from __future__ import annotations

from typing import Any

from searchr1.data.prepare.rows import Question
from searchr1.data.prompts import fill_template, render_prompt, wants_passages

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
    """One output row. `data.dataset` reads all three shapes.

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
    """The columns of `make_row`'s rows; fixed, so that a file's types do not hang on what its first rows hold."""
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
