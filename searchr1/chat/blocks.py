"""The policy's text, cut at its tags while it is still being sampled."""

from __future__ import annotations

import re
from typing import Literal, get_args

from searchr1.agent.loop import END_TOKENS
from searchr1.agent.protocol import TAGS

BlockKind = Literal["text", "think", "search", "access", "information", "answer"]
"""`text` stands outside of all tags. An `information` block in the policy's text was made up by the policy."""

_OPENING: dict[str, BlockKind] = {f"<{kind}>": kind for kind in get_args(BlockKind) if kind in TAGS}
_MARKS = (*_OPENING, *(f"</{tag}>" for tag in TAGS), *END_TOKENS)
_MARK = re.compile("|".join(map(re.escape, _MARKS)))
_OPEN_END = re.compile(rf"({'|'.join(map(re.escape, _OPENING))})\s*$")


class Blocks:
    """A cutter for one generation. Pieces of one block come one after the other; tags and end tokens are dropped.

    There is no nesting: an opening tag begins its block wherever it stands (policies search without closing their
    thoughts), and a closing tag ends whatever block there is.
    """

    def __init__(self, kind: BlockKind = "text") -> None:
        """Begin within a block of this kind."""
        self._kind: BlockKind = kind
        self._fresh = True
        self._blanks = ""
        self._held = ""

    def feed(self, text: str) -> list[tuple[BlockKind, str]]:
        """Add text; return the pieces that are certain by now."""
        return self._cut(self._held + text, last=False)

    def finish(self) -> list[tuple[BlockKind, str]]:
        """End the generation; return what was held back because it might have become a tag."""
        return self._cut(self._held, last=True)

    def _cut(self, text: str, last: bool) -> list[tuple[BlockKind, str]]:
        pieces: list[tuple[BlockKind, str]] = []
        start = 0
        for mark in _MARK.finditer(text):
            self._add(pieces, text[start : mark.start()])
            start = mark.end()
            if mark.group() not in END_TOKENS:
                self._kind, self._fresh, self._blanks = _OPENING.get(mark.group(), "text"), True, ""
        end = len(text) if last else _certain(text, start)
        self._add(pieces, text[start:end])
        self._held = text[end:]
        return pieces

    def _add(self, pieces: list[tuple[BlockKind, str]], text: str) -> None:
        """Add a piece without the blanks at either end of its block."""
        text = text.lstrip() if self._fresh else self._blanks + text
        written = text.rstrip()
        self._blanks = text[len(written) :]
        if written:
            self._fresh = False
            pieces.append((self._kind, written))


def _certain(text: str, start: int) -> int:
    """Return up to where `text` cannot become part of a tag any more."""
    bracket = text.rfind("<", start)
    if bracket < 0:
        return len(text)
    tail = text[bracket:]
    return bracket if any(mark.startswith(tail) for mark in _MARKS) else len(text)


def open_at_end(text: str) -> BlockKind:
    """Return the block that a text leaves open by ending with its tag (`<think>` in RLinf's style), else `text`."""
    tag = _OPEN_END.search(text)
    return _OPENING[tag.group(1)] if tag else "text"
