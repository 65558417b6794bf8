"""What an advantage is computed from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STD_EPS = 1e-6
"""Added to a standard deviation before a division by it."""


@dataclass(frozen=True, slots=True)
class AdvantageInputs:
    """One step's N trajectories, over all ranks: groups must be complete."""

    rewards_N: Tensor
    """Floating point; float64 by the time that an advantage function sees them."""
    group_ids_N: Tensor
    """int, any numbers: trajectories of one prompt share one."""
    policy_tokens_N: Tensor
    """int, tokens that the policy sampled; the weights of whitening."""


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


@dataclass(frozen=True, slots=True)
class Groups:
    """The rewards of each trajectory's own group."""

    size_N: Tensor
    mean_N: Tensor
    std_N: Tensor
    """With n - 1; 0 in a group of one."""
    equal_N: Tensor
    """bool: all rewards of the group are the same, so it says nothing about which rollout was better."""


def groups_of(inputs: AdvantageInputs) -> Groups:
    """Return statistics of the groups, one entry per trajectory."""
    rewards_N = inputs.rewards_N
    _, group_N = inputs.group_ids_N.unique(return_inverse=True)
    size_G = torch.bincount(group_N).to(rewards_N.dtype)
    mean_G = torch.zeros_like(size_G).index_add_(0, group_N, rewards_N) / size_G
    squares_G = torch.zeros_like(size_G).index_add_(0, group_N, (rewards_N - mean_G[group_N]).square())
    # Compared, not computed: rounding in the mean would leave equal rewards with a tiny spread.
    low_G = torch.full_like(size_G, torch.inf).scatter_reduce_(0, group_N, rewards_N, "amin")
    high_G = torch.full_like(size_G, -torch.inf).scatter_reduce_(0, group_N, rewards_N, "amax")
    std_G = (squares_G / (size_G - 1).clamp(min=1)).sqrt()
    return Groups(size_G[group_N], mean_G[group_N], std_G[group_N], (low_G == high_G)[group_N])


def whiten(advantages_N: Tensor, policy_tokens_N: Tensor) -> Tensor:
    """Shift and scale to mean 0 and variance 1 over all policy tokens (each carries its trajectory's advantage).

    Without spread the result is 0.
    """
    weights_N = policy_tokens_N.to(advantages_N.dtype)
    tokens = weights_N.sum().clamp(min=1)
    centred_N = advantages_N - (advantages_N * weights_N).sum() / tokens
    variance = (centred_N.square() * weights_N).sum() / (tokens - 1).clamp(min=1)
    return centred_N / (variance.sqrt() + STD_EPS)
