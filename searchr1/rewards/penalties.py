"""What is taken off any reward: for long responses and for many searches."""

from __future__ import annotations

from searchr1.agent.trajectory import Trajectory
from searchr1.config.schema_reward import LengthPenaltyConfig, RewardConfig, SearchPenaltyConfig


def penalties(trajectory: Trajectory, config: RewardConfig) -> dict[str, float]:
    """The penalties that are on, 0 or negative each, by the names of their YAML sections."""
    found = {}
    if config.length_penalty is not None:
        found["length_penalty"] = length_penalty(trajectory, config.length_penalty)
    if config.search_penalty is not None:
        found["search_penalty"] = search_penalty(trajectory, config.search_penalty)
    return found


def length_penalty(trajectory: Trajectory, config: LengthPenaltyConfig) -> float:
    """DAPO's overlong shaping (https://arxiv.org/abs/2503.14476, eq. 13), times `penalty_factor`.

    With y tokens, L = `max_length` and C = `overlong_buffer`: 0 up to L - C, then (L - C - y) / C, and -1 above L.
    """
    length = trajectory.response_length if config.tokens == "response" else trajectory.policy_length
    over = length - (config.max_length - config.overlong_buffer)
    if over <= 0:
        return 0.0
    return -config.penalty_factor * min(over / config.overlong_buffer, 1.0)


def search_penalty(trajectory: Trajectory, config: SearchPenaltyConfig) -> float:
    """`per_search` off for every query beyond the `free_searches` first ones."""
    return -config.per_search * max(trajectory.searches - config.free_searches, 0)
