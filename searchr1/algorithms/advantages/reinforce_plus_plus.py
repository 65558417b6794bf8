"""REINFORCE++: one baseline for the whole batch, not one per question. https://arxiv.org/abs/2501.03262"""

from __future__ import annotations

import torch
from torch import Tensor

from searchr1.algorithms.advantages.inputs import AdvantageInputs, AdvantageSettings, groups_of, whiten


def reinforce_plus_plus(inputs: AdvantageInputs, settings: AdvantageSettings) -> Tensor:
    """Rewards whitened over all policy tokens of the step; works with one rollout per question."""
    return whiten(inputs.rewards_N, inputs.policy_tokens_N)


def reinforce_plus_plus_baseline(inputs: AdvantageInputs, settings: AdvantageSettings) -> Tensor:
    """Reward - group mean, whitened over all policy tokens of the step."""
    groups = groups_of(inputs)
    centred_N = torch.where(groups.equal_N, 0.0, inputs.rewards_N - groups.mean_N)
    return whiten(centred_N, inputs.policy_tokens_N)
