from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from searchr1.agent.trajectory import Sample, Trajectory, Turn


@pytest.fixture
def make_trajectory() -> Callable[..., Trajectory]:
    """A trajectory of one search and one answer; any field can be given."""

    def make(index: int = 0, rollout_id: int = 0, source: str = "one_hop", right: bool = True, **fields: Any) -> Trajectory:
        turns = [
            Turn("<search>who</search>", "search", 4, ["who"], "<information>Ann</information>", 3, 0.5),
            Turn(f"<answer> {'Ann' if right else 'Bob'} </answer>", "answer", 3),
        ]
        defaults: dict[str, Any] = {
            "sample": Sample(f"{source}/{index}", index, [1, 2], "Who?", ["Ann"], source),
            "rollout_id": rollout_id,
            "response_ids": np.arange(10, dtype=np.int32),
            "loss_mask": np.array([True] * 4 + [False] * 3 + [True] * 3),
            "rollout_logprobs": np.zeros(10, np.float32),
            "turns": turns,
            "stop": "answer",
            "reward": float(right),
            "reward_parts": {"reward": float(right), "exact_match": float(right), "f1": float(right)},
        }
        return Trajectory(**(defaults | fields))

    return make
