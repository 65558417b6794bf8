"""A question and its trajectory, as every part of the system passes them on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

ActionKind = Literal["search", "access", "answer", "invalid", "none"]
StopReason = Literal["answer", "turns", "length", "eos", "error"]
Mode = Literal["train", "eval"]


@dataclass(slots=True)
class Sample:
    """One question, ready for the policy."""

    id: str
    """Stable over runs: `"{data_source}/{row index}"`."""
    index: int
    """Position in the step's batch; groups are sorted by it before training."""
    prompt_ids: list[int]
    question: str
    golden_answers: list[str]
    data_source: str = "unknown"
    reward_name: str | None = None
    """The row's own reward (`exact_match`, a dotted path, …); None takes the config's `reward.reward_type`."""
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Turn:
    """One generation and, if it called a tool, what came back."""

    policy_text: str
    action: ActionKind
    policy_tokens: int
    queries: list[str] = field(default_factory=list)
    """What was sent to the tool; empty if no call was made (a search in the forced last turn is not answered)."""
    tool_text: str = ""
    """What the environment appended, tags included; empty if nothing."""
    tool_tokens: int = 0
    tool_seconds: float = 0.0
    tool_error: str | None = None


@dataclass(slots=True)
class Trajectory:
    """One rollout of one question. N is the number of response tokens (policy and environment)."""

    sample: Sample
    rollout_id: int
    """Which of the group's `group_size` rollouts this is."""
    response_ids: npt.NDArray[np.int32]
    """[N] what the policy sampled and what the environment wrote, in order."""
    loss_mask: npt.NDArray[np.bool_]
    """[N] True where the token was sampled by the policy."""
    rollout_logprobs: npt.NDArray[np.float32]
    """[N] log-probability under the sampling distribution; 0 where the mask is False."""
    turns: list[Turn]
    stop: StopReason
    weight_version: int = 0
    forced_final: bool = False
    """True if the last generation was forced because the search turns were used up."""
    reward: float = 0.0
    reward_parts: dict[str, float] = field(default_factory=dict)
    ref_logprobs: npt.NDArray[np.float32] | None = None
    """[N] under the reference model; None until (or unless) the inference group has seen it."""

    @property
    def policy_text(self) -> str:
        """Everything that the policy wrote and nothing that it read."""
        return "".join(turn.policy_text for turn in self.turns)

    @property
    def response_length(self) -> int:
        """Response tokens, policy and environment."""
        return len(self.response_ids)

    @property
    def policy_length(self) -> int:
        """Tokens sampled by the policy."""
        return int(self.loss_mask.sum())

    @property
    def searches(self) -> int:
        """Search queries sent."""
        return sum(len(turn.queries) for turn in self.turns if turn.action == "search")

    @property
    def tool_calls(self) -> int:
        """Turns that called a tool."""
        return sum(bool(turn.queries) for turn in self.turns)

    @property
    def tool_failures(self) -> int:
        """Turns whose tool call failed."""
        return sum(turn.tool_error is not None for turn in self.turns)

    @property
    def invalid_actions(self) -> int:
        """Turns in which the policy neither searched nor answered."""
        return sum(turn.action == "invalid" for turn in self.turns)


@dataclass(slots=True)
class Chunk:
    """Finished trajectories on their way through the groups: one channel message."""

    step: int
    mode: Mode
    trajectories: list[Trajectory]
