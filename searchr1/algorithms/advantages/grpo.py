"""GRPO: rewards relative to the other rollouts of the same question. https://arxiv.org/abs/2402.03300"""

from __future__ import annotations

import torch
from torch import Tensor

from searchr1.algorithms.advantages.inputs import STD_EPS, AdvantageInputs, AdvantageSettings, groups_of


def grpo(inputs: AdvantageInputs, settings: AdvantageSettings) -> Tensor:
    """(reward - group mean) / (group standard deviation + 1e-6), with n - 1 in the standard deviation.

    A group of one, and a group whose rewards are all equal, has advantage exactly 0.
    """
    groups = groups_of(inputs)
    advantages_N = (inputs.rewards_N - groups.mean_N) / (groups.std_N + STD_EPS)
    return torch.where(groups.equal_N, 0.0, advantages_N)
