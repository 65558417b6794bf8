"""The tags between policy and environment: reading the policy's, writing the environment's. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from searchr1.agent.trajectory import ActionKind
from searchr1.files.text_rows import whole_text

TAGS = ("think", "search", "information", "answer", "access")
InformationStyle = Literal["searchr1", "rlinf"]
TruncateSide = Literal["right", "left", "middle"]
ToolcallParser = Literal["tags", "searchr1", "searchr1-qwen"]

NO_RESULTS = "No search results are found."
RLINF_DOCUMENT_CHARACTERS = 5_000
"""The "rlinf" style cuts each document here."""

_ACTION = re.compile(r"<(search|access|answer)>(.*?)</\1>", re.DOTALL)
# A tag of ours in any case, with blanks or attributes, closed or not; and the chat markers of Qwen and Llama.
_OURS = re.compile(rf"<(?=\s*/?\s*(?:{'|'.join(TAGS)})\b)", re.IGNORECASE)
_CHAT = re.compile(r"<(?=\|[^<>|]{1,40}\|>)")


@dataclass(frozen=True, slots=True)
class Document:
    """One search result."""

    title: str
    text: str
    id: str = ""
    url: str = ""
    score: float | None = None
    contents: str = ""
    """Title and text as the server sent them; empty if they did not come in one piece."""


@dataclass(frozen=True, slots=True)
class Action:
    """What a turn of the policy asks for."""

    kind: ActionKind
    arguments: list[str] = field(default_factory=list)
    """Queries of a search, addresses of an access, the text of an answer."""


def parse_action(text: str) -> Action:
    """Return what the policy's turn asks for.

    The first complete tag decides: an answer ends, a search or an access calls the tool with every further query of
    the same kind up to the end of the turn or up to an answer. An empty query counts as invalid. Where an opening tag is
    repeated before its closing one, the query starts after the last.
    """
    first = _ACTION.search(text)
    if first is None:
        return Action("invalid")
    kind: ActionKind = first.group(1)  # type: ignore[assignment]  # the pattern knows only these
    if kind == "answer":
        return Action("answer", [first.group(2).strip()])
    arguments = []
    for found in _ACTION.finditer(text, first.start()):
        if found.group(1) == "answer":
            break
        argument = found.group(2).rpartition(f"<{kind}>")[2].strip()
        if found.group(1) == kind and argument:
            arguments.append(argument)
    return Action(kind, arguments) if arguments else Action("invalid")


def neutralise(text: str) -> str:
    """Retrieved text with every tag of ours and every chat marker made harmless: `<` becomes `‹`.

    What the environment writes can then neither end a turn nor look like an answer; tokenizers take it. Idempotent.
    """
    return _CHAT.sub("‹", _OURS.sub("‹", whole_text(text)))


def render_body(
    results: Sequence[Sequence[Document]], style: InformationStyle, no_results_message: str | None = None
) -> str:
    """Return what stands between the information tags; results of several queries follow each other.

    `no_results_message` stands there if nothing was found; None is the usual one.
    """
    documents = [document for found in results for document in found]
    if not documents:
        return NO_RESULTS if no_results_message is None else no_results_message
    if style == "rlinf":
        return "\n\n".join(
            f"[Doc {i}]({neutralise(d.url)}):\n{neutralise(_contents(d)[:RLINF_DOCUMENT_CHARACTERS])}"
            for i, d in enumerate(documents, start=1)
        )
    return "\n".join(
        f'Doc {i}(Title: "{neutralise(d.title)}") {neutralise(d.text)}' for i, d in enumerate(documents, start=1)
    )


def _contents(document: Document) -> str:
    """Return a document in one piece, as retrieval servers send it."""
    return document.contents or (f'"{document.title}"\n{document.text}' if document.title else document.text)


def frame(style: InformationStyle) -> tuple[str, str]:
    """Return what the environment writes before and after a body."""
    if style == "rlinf":
        return "\n\n<information>\n", "\n</information>\n<think>\n"
    return "\n\n<information>", "</information>\n\n"


def render_information(results: Sequence[Sequence[Document]], style: InformationStyle) -> str:
    """Return a whole tool text, tags included, without a length limit."""
    before, after = frame(style)
    return before + render_body(results, style) + after


def truncate_ids(body_ids: list[int], limit: int, side: TruncateSide) -> list[int]:
    """Return at most `limit` tokens of a body; `side` says which end is lost."""
    if len(body_ids) <= limit:
        return body_ids
    if limit <= 0:
        return []
    if side == "right":
        return body_ids[:limit]
    if side == "left":
        return body_ids[-limit:]
    tail = limit // 2
    return body_ids[: limit - tail] + (body_ids[-tail:] if tail else [])


def truncate_block(
    block_ids: list[int], before_ids: list[int], after_ids: list[int], limit: int, side: TruncateSide
) -> list[int]:
    """Return a tool text that was tokenized as one string, with at most `limit` tokens beside those of its tags.

    Up to the cut the tokens are the block's own; a tag next to the cut is tokenized by itself.
    """
    size = len(block_ids)
    if size <= len(before_ids) + limit + len(after_ids):
        return block_ids
    tail = {"right": 0, "left": limit, "middle": limit // 2}[side]
    head = limit - tail
    start = block_ids[: len(before_ids) + head] if head else before_ids
    end = block_ids[size - len(after_ids) - tail :] if tail else after_ids
    return start + end


def truncate_text(text: str, tokenizer: Any, limit: int, side: TruncateSide) -> str:
    """Return a text of at most `limit` tokens; one that has no more is left as it is."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    kept = truncate_ids(ids, limit, side)
    return text if len(kept) == len(ids) else str(tokenizer.decode(kept))


def last_answer(policy_text: str) -> str | None:
    """Return the text of the last complete answer tag, or None."""
    answers = re.findall(r"<answer>(.*?)</answer>", policy_text, re.DOTALL)
    return answers[-1].strip() if answers else None
