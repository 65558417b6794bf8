"""RLOO: the baseline of a rollout is the mean reward of the others. https://arxiv.org/abs/2402.14740"""

from __future__ import annotations

import torch
from torch import Tensor

from searchr1.algorithms.advantages.inputs import AdvantageInputs, AdvantageSettings, groups_of


def rloo(inputs: AdvantageInputs, settings: AdvantageSettings) -> Tensor:
    """Reward - mean reward of the group's other rollouts = (reward - group mean) n / (n - 1).

    A rollout without others has no baseline, and advantage 0.
    """
    groups = groups_of(inputs)
    scale_N = groups.size_N / (groups.size_N - 1).clamp(min=1)
    return torch.where(groups.equal_N, 0.0, (inputs.rewards_N - groups.mean_N) * scale_N)
