"""Trajectories for tests: drawn at random, or from turns written by hand."""

from __future__ import annotations

import numpy as np

from searchr1.agent.protocol import parse_action
from searchr1.agent.trajectory import Sample, Trajectory, Turn
from support.models import VOCAB


def random_trajectories(
    seed: int, count: int = 8, vocab: int = VOCAB, level: float = -5.7
) -> tuple[list[Trajectory], list[float]]:
    """Draw trajectories in groups of two, and an advantage for each; log-probabilities lie around `level`."""
    rng = np.random.default_rng(seed)
    trajectories = []
    for index in range(count):
        length = int(rng.integers(5, 40))
        mask = rng.random(length) < 0.7
        mask[0] = True
        near = np.where(mask, level + rng.normal(0, 0.1, (2, length)), 0).astype(np.float32)
        trajectories.append(
            Trajectory(
                sample=Sample(f"s/{index}", index // 2, rng.integers(0, vocab, 6).tolist(), "", []),
                rollout_id=index % 2,
                response_ids=rng.integers(0, vocab, length).astype(np.int32),
                loss_mask=mask,
                rollout_logprobs=near[0],
                turns=[],
                stop="answer",
                ref_logprobs=near[1],
            )
        )
    return trajectories, rng.normal(size=count).tolist()


def turn(policy_text: str, tool_text: str = "", error: str | None = None) -> Turn:
    """Return a turn as the loop writes it; a query counts as sent if there is a tool text."""
    action = parse_action(policy_text)
    called = action.kind in ("search", "access") and bool(tool_text)
    return Turn(
        policy_text, action.kind, 1, queries=action.arguments if called else [], tool_text=tool_text, tool_error=error
    )


def trajectory(
    *turns: Turn, golds: tuple[str, ...] = ("Paris",), question: str = "Q?", reward_name: str | None = None,
    policy_tokens: int = 1, tool_tokens: int = 0,
) -> Trajectory:  # fmt: skip
    """Return a trajectory of these turns, with as many tokens."""
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
