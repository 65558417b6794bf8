"""The events of an answer, in memory and as JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from searchr1.agent.trajectory import StopReason, Trajectory
from searchr1.chat.blocks import BlockKind


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
