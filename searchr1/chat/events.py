"""The events of an answer, in memory and as JSON, and the policy's text cut at its tags while it is being sampled."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from searchr1.agent.loop import END_TOKENS
from searchr1.agent.protocol import TAGS
from searchr1.agent.trajectory import StopReason, Trajectory

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


@dataclass(frozen=True, slots=True)
class Event:
    """One event; `type` is its name in JSON."""

    type: ClassVar[str]

    def as_json(self) -> dict[str, Any]:
        """Return the event as `{"type", …}`."""
        return {"type": self.type, **dataclasses.asdict(self)}


@dataclass(frozen=True, slots=True)
class Waiting(Event):
    """Other questions are answered first."""

    type: ClassVar[str] = "waiting"
    before: int
    """Answers that have to end first."""


@dataclass(frozen=True, slots=True)
class Started(Event):
    """The prompt is ready."""

    type: ClassVar[str] = "started"
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class TurnStarted(Event):
    """The model begins to write."""

    type: ClassVar[str] = "turn"
    number: int


@dataclass(frozen=True, slots=True)
class Text(Event):
    """The model wrote more of a block."""

    type: ClassVar[str] = "text"
    block: BlockKind
    text: str


@dataclass(frozen=True, slots=True)
class ToolCalled(Event):
    """A search or an access is under way."""

    type: ClassVar[str] = "call"
    action: str
    """"search" or "access"."""
    arguments: list[str]
    """Queries or addresses."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A passage or page that a tool returned."""

    title: str
    text: str
    url: str
    score: float | None = None


@dataclass(frozen=True, slots=True)
class ToolReturned(Event):
    """A tool answered: for each query (or address) its passages, before anything is cut to the model's limit."""

    type: ClassVar[str] = "found"
    action: str
    results: list[list[Passage]]
    seconds: float


@dataclass(frozen=True, slots=True)
class ToolFailed(Event):
    """A tool failed; the model reads that and goes on."""

    type: ClassVar[str] = "tool_failed"
    action: str
    message: str


@dataclass(frozen=True, slots=True)
class Read(Event):
    """The exact text that the model was given to read."""

    type: ClassVar[str] = "read"
    text: str
    tokens: int


@dataclass(frozen=True, slots=True)
class InvalidAction(Event):
    """The turn neither called a tool nor answered; `text` is the message that the model was given."""

    type: ClassVar[str] = "invalid"
    text: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts of one answer."""

    turns: int
    searches: int
    tool_failures: int
    invalid_actions: int
    prompt_tokens: int
    policy_tokens: int
    read_tokens: int
    seconds: float
    tool_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens that the model sampled per second, the time of tool calls left out."""
        return self.policy_tokens / max(self.seconds - self.tool_seconds, 1e-9)


@dataclass(frozen=True, slots=True)
class Done(Event):
    """The end, with or without an answer."""

    type: ClassVar[str] = "done"
    answer: str | None
    stop: StopReason
    note: str | None
    """The reason for a missing answer."""
    stats: Stats
    trajectory: Trajectory
    """Every token; not part of the JSON."""

    def as_json(self) -> dict[str, Any]:
        """Return the event without its trajectory."""
        stats = dataclasses.asdict(self.stats) | {"tokens_per_second": round(self.stats.tokens_per_second, 1)}
        return {"type": self.type, "answer": self.answer, "stop": self.stop, "note": self.note, "stats": stats}


@dataclass(frozen=True, slots=True)
class Failed(Event):
    """The end, because of an error."""

    type: ClassVar[str] = "error"
    message: str
