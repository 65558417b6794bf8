"""Policy-gradient losses per token: one file per algorithm, one line here.

A user's own needs no line: `algorithm.loss_type: package.module:function`, see examples/custom_algorithm.
"""

from __future__ import annotations

from searchr1.algorithms.lookup import find_function
from searchr1.algorithms.policy_losses.cispo import cispo
from searchr1.algorithms.policy_losses.gspo import gspo
from searchr1.algorithms.policy_losses.inputs import ClipSettings, PolicyInputs, PolicyLoss, TokenLosses
from searchr1.algorithms.policy_losses.ppo_clip import ppo_clip
from searchr1.algorithms.policy_losses.sapo import sapo

__all__ = ["POLICY_LOSSES", "ClipSettings", "PolicyInputs", "PolicyLoss", "TokenLosses", "policy_loss"]

POLICY_LOSSES: dict[str, PolicyLoss] = {"actor": ppo_clip, "gspo": gspo, "cispo": cispo, "sapo": sapo}


def policy_loss(name: str) -> PolicyLoss:
    """Return the loss that `algorithm.loss_type` names.

    Raises:
        UserError: neither a known name nor the path of a function.
    """
    return find_function(POLICY_LOSSES, name, "algorithm.loss_type")
