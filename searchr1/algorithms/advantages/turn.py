"""Turn-level advantages for multi-turn rollouts (MT-GRPO). https://arxiv.org/abs/2505.11821

Every turn but the last has a reward of its own, here whether what it retrieved contains a gold answer. It is compared with
the same turn of the other rollouts at the question, and added to the rollout's advantage:

    A_k = A + weight * (r_k - mean of r_k in the group) / (standard deviation + 1e-6)

The last turn, which answers, has A alone. A rollout that has no turn k does not count in that turn's mean, so the added
part teaches to search better and has no effect on the decision to search at all (docs/algorithms/turn-level.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from searchr1.algorithms.advantages.inputs import STD_EPS


def turn_advantages(
    advantages_N: Tensor, turn_rewards: Sequence[Sequence[float]], group_ids_N: Tensor, weight: float
) -> list[list[float]]:
    """Return one advantage per turn of each rollout.

    Args:
        advantages_N: of the rollouts as wholes, from any estimator.
        turn_rewards: of each rollout's turns; the last turn's is not read.
        group_ids_N: rollouts at one question share one.
        weight: of the turn's own part.
    """
    groups: dict[int, list[int]] = {}
    for rollout, group in enumerate(group_ids_N.tolist()):
        groups.setdefault(group, []).append(rollout)
    found = [
        [float(advantage)] * max(1, len(rewards)) for advantage, rewards in zip(advantages_N, turn_rewards, strict=True)
    ]
    for members in groups.values():
        for turn in range(max(len(turn_rewards[rollout]) for rollout in members) - 1):
            having = [rollout for rollout in members if turn < len(turn_rewards[rollout]) - 1]
            rewards = torch.tensor([turn_rewards[rollout][turn] for rollout in having], dtype=torch.float64)
            if len(having) < 2 or bool((rewards == rewards[0]).all()):
                continue
            relative = (rewards - rewards.mean()) / (rewards.std() + STD_EPS)
            for rollout, value in zip(having, relative.tolist(), strict=True):
                found[rollout][turn] += weight * value
    return found
