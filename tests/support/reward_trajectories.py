"""Trajectories for tests, from turns written by hand."""

from __future__ import annotations

import numpy as np

from searchr1.agent.protocol import parse_action
from searchr1.agent.trajectory import Sample, Trajectory, Turn


def turn(policy_text: str, tool_text: str = "", error: str | None = None) -> Turn:
    """A turn as the loop writes it; a query counts as sent if there is a tool text."""
    action = parse_action(policy_text)
    called = action.kind in ("search", "access") and bool(tool_text)
    return Turn(
        policy_text, action.kind, 1, queries=action.arguments if called else [], tool_text=tool_text, tool_error=error
    )


def trajectory(
    *turns: Turn, golds: tuple[str, ...] = ("Paris",), question: str = "Q?", reward_name: str | None = None,
    policy_tokens: int = 1, tool_tokens: int = 0,
) -> Trajectory:  # fmt: skip
    """A trajectory of these turns, with as many tokens."""
    mask = np.array([True] * policy_tokens + [False] * tool_tokens)
    return Trajectory(
        sample=Sample("set/0", 0, [1], question, list(golds), reward_name=reward_name),
        rollout_id=0,
        response_ids=np.zeros(len(mask), np.int32),
        loss_mask=mask,
        rollout_logprobs=np.zeros(len(mask), np.float32),
        turns=list(turns),
        stop="answer",
    )
