"""From the rewards of a step's trajectories to their advantages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from searchr1.errors import UserError

STD_EPS = 1e-6
"""Added to a group's standard deviation before the division."""
LOSS_SCALES = ("group_level", "agent_level", "turn_level")
"""Accepted `algorithm.loss_scales`, in the order in which they must be given."""


@dataclass(frozen=True, slots=True)
class AdvantageInputs:
    """One step's N trajectories, over all ranks: groups must be complete."""

    rewards_N: Tensor
    """Floating point."""
    group_ids_N: Tensor
    """int, any numbers: trajectories of one prompt share one."""
    policy_tokens_N: Tensor
    """int, tokens that the policy sampled; the weights of `normalize_advantages`."""


@dataclass(frozen=True, slots=True)
class AdvantageSettings:
    """The `algorithm` keys that shape advantages."""

    adv_type: str = "grpo"
    normalize: bool = False
    """`normalize_advantages`: whiten over all policy tokens of the step."""
    mode: str = "trajectory"
    """`advantage_mode`, read by `grpo_dynamic`: only `trajectory` is supported."""
    loss_scales: Sequence[str] = ()
    """Read by `grpo_dynamic`."""


AdvantageFunction = Callable[[AdvantageInputs, AdvantageSettings], Tensor]
"""-> [N], the advantage of every policy token of a trajectory."""


def grpo(inputs: AdvantageInputs, settings: AdvantageSettings) -> Tensor:
    """(reward - group mean) / (group standard deviation + 1e-6), with n - 1 in the standard deviation.

    A group of one, and a group whose rewards are all equal, has advantage exactly 0.
    """
    rewards_N = inputs.rewards_N
    _, group_N = inputs.group_ids_N.unique(return_inverse=True)
    size_G = torch.bincount(group_N).to(rewards_N.dtype)
    groups = len(size_G)
    mean_G = rewards_N.new_zeros(groups).index_add_(0, group_N, rewards_N) / size_G
    centred_N = rewards_N - mean_G[group_N]
    variance_G = rewards_N.new_zeros(groups).index_add_(0, group_N, centred_N.square()) / (size_G - 1).clamp(min=1)
    advantages_N = centred_N / (variance_G.sqrt() + STD_EPS)[group_N]
    # Rounding in the mean would otherwise leave a group of equal rewards with a tiny advantage.
    low_G = rewards_N.new_full((groups,), torch.inf).scatter_reduce_(0, group_N, rewards_N, "amin")
    high_G = rewards_N.new_full((groups,), -torch.inf).scatter_reduce_(0, group_N, rewards_N, "amax")
    return torch.where((low_G == high_G)[group_N], torch.zeros_like(advantages_N), advantages_N)


def grpo_dynamic(inputs: AdvantageInputs, settings: AdvantageSettings) -> Tensor:
    """RLinf's name for GRPO over trajectories whose turns may be separate sequences of several agents.

    Its loss scales weight a turn by 1 / (agents of the trajectory) and by its share of the agent's tokens. Here a
    trajectory is one sequence with all its turns and one agent, so every scale is exactly 1 and the result is
    plain GRPO.

    Raises:
        UserError: `advantage_mode` is not `trajectory`, or `loss_scales` is not the beginning of
            `[group_level, agent_level, turn_level]`.
    """
    if settings.mode != "trajectory":
        raise UserError(
            f"algorithm.advantage_mode: '{settings.mode}' is not supported: a trajectory is trained as one sequence; "
            "use 'trajectory'"
        )
    if tuple(settings.loss_scales) != LOSS_SCALES[: len(settings.loss_scales)]:
        raise UserError(
            f"algorithm.loss_scales: {list(settings.loss_scales)} must be the beginning of {list(LOSS_SCALES)}, "
            "in that order"
        )
    return grpo(inputs, settings)


ADVANTAGES: dict[str, AdvantageFunction] = {"grpo": grpo, "grpo_dynamic": grpo_dynamic}


def whiten(advantages_N: Tensor, policy_tokens_N: Tensor) -> Tensor:
    """Mean 0 and variance 1 over all policy tokens (each token carries its trajectory's advantage).

    Without spread the result is 0.
    """
    weights_N = policy_tokens_N.to(advantages_N.dtype)
    tokens = weights_N.sum().clamp(min=1)
    centred_N = advantages_N - (advantages_N * weights_N).sum() / tokens
    variance = (centred_N.square() * weights_N).sum() / (tokens - 1).clamp(min=1)
    return centred_N / (variance.sqrt() + STD_EPS)


def compute_advantages(inputs: AdvantageInputs, settings: AdvantageSettings) -> Tensor:
    """[N] advantages under `algorithm.adv_type`, in the dtype of the rewards.

    Raises:
        UserError: unknown `adv_type`, or settings that it does not support.
        ValueError: shapes differ or a reward is not finite.
    """
    if settings.adv_type not in ADVANTAGES:
        raise UserError(f"algorithm.adv_type: unknown '{settings.adv_type}'; use one of {', '.join(sorted(ADVANTAGES))}")
    if not inputs.rewards_N.shape == inputs.group_ids_N.shape == inputs.policy_tokens_N.shape:
        raise ValueError("rewards_N, group_ids_N and policy_tokens_N differ in shape")
    if not bool(inputs.rewards_N.isfinite().all()):
        raise ValueError("a reward is not finite")
    advantages_N = ADVANTAGES[settings.adv_type](inputs, settings)
    return whiten(advantages_N, inputs.policy_tokens_N) if settings.normalize else advantages_N
