"""Advantages and returns of a step's scored trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from searchr1.agent.trajectory import Trajectory
from searchr1.algorithms import advantages as formulas
from searchr1.algorithms.advantages import AdvantageInputs, AdvantageSettings
from searchr1.algorithms.advantages.gae import gae, whiten_tokens
from searchr1.algorithms.advantages.turn import turn_advantages
from searchr1.algorithms.kl import kl_function
from searchr1.config.schema import AlgorithmConfig
from searchr1.rewards.answers import substring_match

Advantage = float | npt.NDArray[np.float32]
"""One number for all policy tokens of a trajectory, or [N] one per response token."""


def compute_advantages(trajectories: Sequence[Trajectory], algorithm: AlgorithmConfig) -> list[Advantage]:
    """Return the advantages of whole groups: rewards, less the KL if it is in the reward, through `algorithm.adv_type`."""
    rewards_N = torch.tensor([token_rewards(t, algorithm).sum() for t in trajectories], dtype=torch.float64)
    inputs = AdvantageInputs(
        rewards_N=rewards_N,
        group_ids_N=torch.tensor([t.sample.index for t in trajectories]),
        policy_tokens_N=torch.tensor([t.policy_length for t in trajectories]),
    )
    advantages_N = formulas.compute_advantages(
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
    return [repeat_over_turns(t, values) for t, values in zip(trajectories, per_turn, strict=True)]


def compute_token_advantages(
    trajectories: Sequence[Trajectory], algorithm: AlgorithmConfig, values: Sequence[npt.NDArray[np.float32]]
) -> tuple[list[npt.NDArray[np.float32]], list[npt.NDArray[np.float32]]]:
    """Return advantages and returns [N] of each trajectory from the critic's values [N] (`adv_type: gae`)."""
    rewards = [token_rewards(t, algorithm)[: t.policy_length] for t in trajectories]
    seen = [value[t.loss_mask].astype(np.float64) for t, value in zip(trajectories, values, strict=True)]
    advantages, returns = gae(rewards, seen, algorithm.gamma, algorithm.gae_lambda)
    if algorithm.normalize_advantages:
        advantages = whiten_tokens(advantages)
    return (
        [over_response(t, advantage) for t, advantage in zip(trajectories, advantages, strict=True)],
        [over_response(t, target) for t, target in zip(trajectories, returns, strict=True)],
    )


def token_rewards(trajectory: Trajectory, algorithm: AlgorithmConfig) -> npt.NDArray[np.float64]:
    """Return rewards [P] per policy token: the trajectory's at its last one, less the KL of each if that is in the reward.

    Without a policy token there is one number all the same: the trajectory's reward.
    """
    rewards = np.zeros(max(1, trajectory.policy_length))
    rewards[-1] = trajectory.reward
    if algorithm.kl_in == "reward" and algorithm.kl_beta != 0 and trajectory.policy_length:
        rewards -= algorithm.kl_beta * token_kl(trajectory, algorithm.kl_penalty_type)
    return rewards


def token_kl(trajectory: Trajectory, estimator: str) -> npt.NDArray[np.float64]:
    """Return estimates [P] of KL(policy || reference) at the policy tokens, with the weights that sampled."""
    if trajectory.ref_logprobs is None:
        raise ValueError(f"{trajectory.sample.id}: no reference log-probabilities for the KL in the reward")
    mask = trajectory.loss_mask
    sampled = torch.from_numpy(trajectory.rollout_logprobs[mask]).double()
    reference = torch.from_numpy(trajectory.ref_logprobs[mask]).double()
    kl_P: npt.NDArray[np.float64] = kl_function(estimator)(sampled, reference).numpy()
    return kl_P


def over_response(trajectory: Trajectory, policy_values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return [N] with one number for each policy token and 0 elsewhere."""
    values_N = np.zeros(trajectory.response_length, dtype=np.float32)
    values_N[trajectory.loss_mask] = policy_values
    return values_N


def evidence_rewards(trajectory: Trajectory) -> list[float]:
    """Return 1 for each turn that retrieved a gold answer, 0 for the others."""
    golds = trajectory.sample.golden_answers
    return [substring_match(turn.tool_text, golds) if turn.queries else 0.0 for turn in trajectory.turns]


def repeat_over_turns(trajectory: Trajectory, per_turn: list[float]) -> npt.NDArray[np.float32]:
    """Return [N] the advantage of the turn that each response token belongs to."""
    lengths = [turn.policy_tokens + turn.tool_tokens for turn in trajectory.turns]
    values_N = np.repeat(np.asarray(per_turn[: len(lengths)], dtype=np.float32), lengths)
    if len(values_N) != trajectory.response_length:
        raise ValueError(
            f"{trajectory.sample.id}: turns of {len(values_N)} tokens in a response of {trajectory.response_length}"
        )
    return values_N
