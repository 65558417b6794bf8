"""From the rewards of a step's trajectories to their advantages: one file per algorithm, one line here.

A user's own needs no line: `algorithm.adv_type: package.module:function`, see examples/custom_algorithm.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from searchr1.algorithms.advantages.dr_grpo import dr_grpo
from searchr1.algorithms.advantages.grpo import grpo
from searchr1.algorithms.advantages.grpo_dynamic import grpo_dynamic
from searchr1.algorithms.advantages.inputs import AdvantageFunction, AdvantageInputs, AdvantageSettings, whiten
from searchr1.algorithms.advantages.reinforce_plus_plus import reinforce_plus_plus, reinforce_plus_plus_baseline
from searchr1.algorithms.advantages.rloo import rloo
from searchr1.algorithms.lookup import find_function
from searchr1.errors import UserError

__all__ = ["ADVANTAGES", "AdvantageFunction", "AdvantageInputs", "AdvantageSettings", "compute_advantages"]

ADVANTAGES: dict[str, AdvantageFunction] = {
    "grpo": grpo,
    "grpo_dynamic": grpo_dynamic,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce++": reinforce_plus_plus,
    "reinforce++_baseline": reinforce_plus_plus_baseline,
}


def compute_advantages(inputs: AdvantageInputs, settings: AdvantageSettings) -> Tensor:
    """Return [N] advantages under `algorithm.adv_type`, worked out in float64 and returned in the dtype of the rewards.

    Raises:
        UserError: unknown `adv_type`, settings that it does not support, or a user's own that returns something else.
        ValueError: shapes differ or a reward is not finite.
    """
    function = find_function(ADVANTAGES, settings.adv_type, "algorithm.adv_type")
    if not inputs.rewards_N.shape == inputs.group_ids_N.shape == inputs.policy_tokens_N.shape:
        raise ValueError("rewards_N, group_ids_N and policy_tokens_N differ in shape")
    if not bool(inputs.rewards_N.isfinite().all()):
        raise ValueError("a reward is not finite")
    advantages_N = function(replace(inputs, rewards_N=inputs.rewards_N.double()), settings)
    if advantages_N.shape != inputs.rewards_N.shape or not bool(advantages_N.isfinite().all()):
        raise UserError(
            "algorithm.adv_type",
            f"{settings.adv_type} must return {len(inputs.rewards_N)} finite numbers, one per "
            f"trajectory; found {advantages_N}",
        )
    if settings.normalize:
        advantages_N = whiten(advantages_N, inputs.policy_tokens_N)
    return advantages_N.to(inputs.rewards_N.dtype)
