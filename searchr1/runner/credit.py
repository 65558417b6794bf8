"""From a step's scored trajectories to what each policy token is worth."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from searchr1.agent.trajectory import Trajectory
from searchr1.algorithms.advantages import AdvantageInputs, AdvantageSettings, compute_advantages
from searchr1.algorithms.advantages.turn import turn_advantages
from searchr1.algorithms.kl import kl_function
from searchr1.config.schema import AlgorithmConfig
from searchr1.rewards.answers import substring_match

Advantage = float | npt.NDArray[np.float32]
"""Of all policy tokens of a trajectory, or [N] one per response token."""


def assign_credit(trajectories: list[Trajectory], algorithm: AlgorithmConfig) -> list[Advantage]:
    """The advantages of whole groups: rewards, less the KL if it is in the reward, through `algorithm.adv_type`."""
    rewards_N = torch.tensor([t.reward for t in trajectories], dtype=torch.float64)
    if algorithm.kl_in == "reward" and algorithm.kl_beta != 0:
        divergences = [kl_of(t, algorithm.kl_penalty_type) for t in trajectories]
        rewards_N = rewards_N - algorithm.kl_beta * torch.tensor(divergences, dtype=torch.float64)
    inputs = AdvantageInputs(
        rewards_N=rewards_N,
        group_ids_N=torch.tensor([t.sample.index for t in trajectories]),
        policy_tokens_N=torch.tensor([t.policy_length for t in trajectories]),
    )
    advantages_N = compute_advantages(
        inputs,
        AdvantageSettings(
            adv_type=algorithm.adv_type,
            normalize=algorithm.normalize_advantages,
            mode="trajectory",
            loss_scales=algorithm.loss_scales,
        ),
    )
    if algorithm.advantage_mode == "trajectory":
        return list(advantages_N.tolist())
    rewards = [evidence_rewards(t) for t in trajectories]
    per_turn = turn_advantages(advantages_N, rewards, inputs.group_ids_N, algorithm.turn_reward_weight)
    return [spread_over_tokens(t, values) for t, values in zip(trajectories, per_turn, strict=True)]


def kl_of(trajectory: Trajectory, estimator: str) -> float:
    """Sum over the policy tokens of an estimate of KL(policy || reference), at the weights that sampled."""
    if trajectory.ref_logprobs is None:
        raise ValueError(f"{trajectory.sample.id}: no reference log-probabilities for the KL in the reward")
    mask = trajectory.loss_mask
    sampled = torch.from_numpy(trajectory.rollout_logprobs[mask]).double()
    return float(kl_function(estimator)(sampled, torch.from_numpy(trajectory.ref_logprobs[mask]).double()).sum())


def evidence_rewards(trajectory: Trajectory) -> list[float]:
    """Of each turn: whether a gold answer stands in what the turn retrieved."""
    golds = trajectory.sample.golden_answers
    return [substring_match(turn.tool_text, golds) if turn.queries else 0.0 for turn in trajectory.turns]


def spread_over_tokens(trajectory: Trajectory, per_turn: list[float]) -> npt.NDArray[np.float32]:
    """[N] the advantage of the turn that each response token belongs to."""
    lengths = [turn.policy_tokens + turn.tool_tokens for turn in trajectory.turns]
    found = np.repeat(np.asarray(per_turn[: len(lengths)], dtype=np.float32), lengths)
    if len(found) != trajectory.response_length:
        raise ValueError(
            f"{trajectory.sample.id}: turns of {len(found)} tokens in a response of {trajectory.response_length}"
        )
    return found
