"""What happens while a question is being answered."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from searchr1.agent.trajectory import StopReason, Trajectory
from searchr1.chat.blocks import BlockKind


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened; `type` names it in JSON."""

    type: ClassVar[str]

    def as_json(self) -> dict[str, Any]:
        """For the wire: `{"type", …}`."""
        return {"type": self.type, **dataclasses.asdict(self)}


@dataclass(frozen=True, slots=True)
class Waiting(Event):
    """Other questions come first."""

    type: ClassVar[str] = "waiting"
    before: int


@dataclass(frozen=True, slots=True)
class Started(Event):
    """The prompt is made."""

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
    """What was found."""

    title: str
    text: str
    url: str
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Found(Event):
    """A tool answered: for each query (or address) what it found, before anything is cut to the model's limit."""

    type: ClassVar[str] = "found"
    action: str
    results: list[list[Passage]]
    seconds: float


@dataclass(frozen=True, slots=True)
class ToolFailed(Event):
    """A tool gave no answer; the model is told and goes on."""

    type: ClassVar[str] = "tool_failed"
    action: str
    message: str


@dataclass(frozen=True, slots=True)
class Read(Event):
    """What the model was given to read, exactly."""

    type: ClassVar[str] = "read"
    text: str
    tokens: int


@dataclass(frozen=True, slots=True)
class InvalidAction(Event):
    """The turn neither called a tool nor answered; `text` is what the model was told then."""

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
        """Tokens that the model wrote by the second, searches not counted."""
        return self.policy_tokens / max(self.seconds - self.tool_seconds, 1e-9)


@dataclass(frozen=True, slots=True)
class Done(Event):
    """The end, with or without an answer."""

    type: ClassVar[str] = "done"
    answer: str | None
    stop: StopReason
    note: str | None
    """Why there is no answer."""
    stats: Stats
    trajectory: Trajectory
    """Every token; not part of the JSON."""

    def as_json(self) -> dict[str, Any]:
        """Without the trajectory."""
        stats = dataclasses.asdict(self.stats) | {"tokens_per_second": round(self.stats.tokens_per_second, 1)}
        return {"type": self.type, "answer": self.answer, "stop": self.stop, "note": self.note, "stats": stats}


@dataclass(frozen=True, slots=True)
class Failed(Event):
    """The end, because something went wrong."""

    type: ClassVar[str] = "error"
    message: str
