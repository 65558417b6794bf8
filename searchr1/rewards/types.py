"""What a reward is to the rest of the system."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence

from searchr1.agent.trajectory import Trajectory
from searchr1.config.schema_reward import RewardConfig

RewardResult = float | Mapping[str, float]
"""The reward, or parts with a key "reward"."""

RewardFn = Callable[[str, Sequence[str], Trajectory], RewardResult | Awaitable[RewardResult]]
"""(policy_text, golden_answers, trajectory) -> result, at once or awaited."""

RewardMaker = Callable[[RewardConfig], RewardFn]
"""A reward that the YAML's `reward` section says more about."""
