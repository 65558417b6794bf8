"""The question that a row asks: from its column, or from its prompt without what a chat template put around it."""

from __future__ import annotations

import re
from typing import Any

from searchr1.data.golds import is_missing, object_in
from searchr1.data.messages import Message, read_messages
from searchr1.errors import UserError

QUESTION_KEYS = ("question", "Question", "query")
USER_STARTS = (
    "<|im_start|>user", "<|start_header_id|>user<|end_header_id|>", "<start_of_turn>user",
    "<|start_of_role|>user<|end_of_role|>",
    "<|start|>user<|message|>", "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>", "<｜User｜>", "<|user|>", "[INST]", "<|turn>user",
)  # fmt: skip
"""What begins a user's message in rendered chat messages: Qwen, Llama 3, Gemma, Granite, gpt-oss, Command R, DeepSeek, Phi
and GLM, Mistral and Llama 2."""
TURN_ENDS = (
    "<|im_end|>", "<|im_start|>", "<|eot_id|>", "<|eom_id|>", "<|start_header_id|>", "<end_of_turn>", "<start_of_turn>",
    "<|end_of_text|>", "<|start_of_role|>", "<|end|>", "<|start|>", "<|END_OF_TURN_TOKEN|>", "<|START_OF_TURN_TOKEN|>",
    "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<|assistant|>", "<|endoftext|>", "[/INST]", "</s>", "<turn|>", "<|turn>",
)  # fmt: skip
"""What ends it."""
_SYSTEM, _SYSTEM_END = "<<SYS>>", "<</SYS>>"
_SPEAKERS = re.compile(r"(?:^|\s)(?:User|USER|Human)\s*:(?P<text>(?:(?!(?:User|USER|Human)\s*:).)*?)"
    r"\s(?:Assistant|ASSISTANT)\s*:"
    r"\s*(?:Let me solve this step by step\.\s*)?(?:<think>)?\s*$", re.DOTALL)  # fmt: skip
"""A base model's prompt that speaks of `User:` and ends where the assistant is to go on."""
_CUE = re.compile(r"\s*(?:Answer|Response|Assistant|A):")
"""A line at the end that asks for the answer; `_THINK` may follow."""
_THINK = "<think>"


def question_column(row: dict[str, Any]) -> str | None:
    """Return the question in a column of its own; None if there is none.

    Raises:
        UserError: one that is not text.
    """
    for key in QUESTION_KEYS:
        value = row.get(key)
        if isinstance(value, dict) and isinstance(value.get("text"), str):
            value = value["text"]  # Natural Questions' original rows
        if is_missing(value):
            continue
        if not isinstance(value, str):
            raise UserError(f"{key}: is a {type(value).__name__}; expected a text")
        return value
    return None


def question_of_prompt(prompt: object) -> str | None:
    """Return the question of a prompt: a text, or chat messages, of which the user's last one asks; None if it is
    neither.
    """
    if isinstance(prompt, str):
        return bare_question(prompt)
    if not isinstance(prompt, list) or not all(isinstance(message, dict) for message in prompt):
        return None
    asked = [message.get("content") for message in prompt if message.get("role") == "user"]
    asked = asked or [message.get("content") for message in prompt[-1:]]
    return bare_question(asked[-1]) if asked and isinstance(asked[-1], str) else None


def read_prompt(value: object, column: str) -> str | list[Message] | None:
    """Return a row's prompt: a text, chat messages (also written as JSON text), or None.

    Raises:
        UserError: neither.
    """
    written = object_in(value)
    if isinstance(written, list) and written and all(isinstance(item, dict) for item in written):
        value = written
    if isinstance(value, list):
        return read_messages(value, column)
    if is_missing(value) and not isinstance(value, str):
        return None
    if not isinstance(value, str):
        raise UserError(f"{column}: is a {type(value).__name__}; expected a text or a list of chat messages")
    return value


def question_of_row(row: dict[str, Any]) -> str | None:
    """Return what a row of any known shape asks: its own column, else the question in its prompt; None without either.

    Raises:
        UserError: a question or a prompt of a wrong type.
    """
    return question_column(row) or question_of_prompt(read_prompt(row.get("prompt"), "prompt"))


def require_unicode(text: str) -> None:
    """Refuse half of a surrogate pair, which no tokenizer takes.

    Raises:
        UserError: the text has one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"half of a surrogate pair at character {error.start} of {text[:40]!r}; repair it") from error


def is_rendered(text: str) -> bool:
    """Return whether a text is chat messages that a chat template has rendered."""
    return any(start in text for start in USER_STARTS)


def bare_question(text: str) -> str:
    """Return what the last user turn of a prompt asks: the part after its last `Question:`, if it has one."""
    start = max((place + len(mark) for mark in USER_STARTS if (place := text.rfind(mark)) >= 0), default=-1)
    if start >= 0:
        text = text[start:]
        ends = [place for mark in TURN_ENDS if (place := text.find(mark)) >= 0]
        text = _without_system(text[: min(ends)] if ends else text)
    elif speakers := _SPEAKERS.search(text):
        text = speakers["text"]
    return _without_cues(text.rpartition("Question:")[2]).strip()


# What follows does the work of two regular expressions, which take minutes for some texts of a hundred kilobytes.


def _without_system(text: str) -> str:
    """Return a user's message without Llama 2's system prompt."""
    parts, place = [], 0
    while (start := text.find(_SYSTEM, place)) >= 0 and (end := text.find(_SYSTEM_END, start)) >= 0:
        parts.append(text[place:start])
        place = end + len(_SYSTEM_END)
    return "".join([*parts, text[place:]])


def _without_cues(text: str) -> str:
    """Return a text without the lines at its end that ask for the answer."""
    end = _stripped(text, len(text))
    while True:
        cue_end = _stripped(text, end - len(_THINK)) if text.endswith(_THINK, 0, end) else end
        start = text.rfind("\n", 0, cue_end)
        if start < 0 or not _CUE.fullmatch(text, start + 1, cue_end):
            return text[:end]
        end = _stripped(text, start)


def _stripped(text: str, end: int) -> int:
    """Return where `text[:end]` ends without blanks."""
    while end and text[end - 1].isspace():
        end -= 1
    return end
