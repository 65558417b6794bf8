"""The prompt templates by name, and a user's own from a file."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from searchr1.errors import UserError

SEARCHR1 = """\
Answer the question below. Whenever you get new information, first reason about it between <think> and </think>. \
If you find that you lack some knowledge, call a search engine with <search> query </search>; it returns the top \
results between <information> and </information>. You may search as often as you want. When no further knowledge is \
needed, give the answer between <answer> and </answer> without explanations, for example <answer> Beijing </answer>. \
Question: {question}
"""
ASEARCHER = """\
Answer the question below with the help of a search engine and of the pages that it finds. Whenever you get new \
information, first reason about it between <think> and </think>. To search, write <search> query </search>; the top \
results come back between <information> and </information>, each with its address. To read a whole page, write \
<access> url </access> with an address from the results; the page comes back between <information> and </information>, \
a long one in numbered parts. You may search and read as often as you want, one action at a time. When no further \
knowledge is needed, give the answer between <answer> and </answer> without explanations, for example \
<answer> Beijing </answer>. Question: {question}
"""
RAG = """\
Answer the question below. Passages that a search engine found for it come first; some may not help. Rely on them where \
they tell the answer, and otherwise on what you know. Reason between <think> and </think>, then give the answer between \
<answer> and </answer> without explanations, for example <answer> Beijing </answer>.

Passages:
{passages}

Question: {question}
"""
DIRECT = """\
Answer the question below from what you know. Write nothing but the answer, between <answer> and </answer>, for example \
<answer> Beijing </answer>. Question: {question}
"""
COT = """\
Answer the question below from what you know. First reason about it step by step between <think> and </think>, then give \
the answer between <answer> and </answer> without explanations, for example <answer> Beijing </answer>. \
Question: {question}
"""
DEMO = "Question: {question}\n"

TEMPLATES: dict[str, str | None] = {
    "none": None,
    "searchr1": SEARCHR1,
    "asearcher": ASEARCHER,
    "rag": RAG,
    "direct": DIRECT,
    "cot": COT,
    "demo": DEMO,
}
"""By name in `data.prompt_template`; None leaves the row's prompt as it is."""


@lru_cache(maxsize=8)
def template_file(name: str) -> str:
    """Return the text of a user's own `.txt` template.

    Raises:
        UserError: the file is missing, not UTF-8, or without `{question}`.
    """
    try:
        text = Path(name).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("data.prompt_template", f"{name} is not readable ({error})") from error
    if "{question}" not in text:
        raise UserError("data.prompt_template", f"{name} has no {{question}}; write it where the question belongs")
    return text
