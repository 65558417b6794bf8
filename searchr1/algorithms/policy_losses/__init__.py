"""Policy-gradient losses per token: one file per algorithm, one line here."""

from __future__ import annotations

from searchr1.algorithms.policy_losses.cispo import cispo
from searchr1.algorithms.policy_losses.gspo import gspo
from searchr1.algorithms.policy_losses.inputs import ClipSettings, PolicyInputs, PolicyLoss, TokenLosses
from searchr1.algorithms.policy_losses.ppo_clip import ppo_clip
from searchr1.algorithms.policy_losses.sapo import sapo
from searchr1.errors import UserError

__all__ = ["POLICY_LOSSES", "ClipSettings", "PolicyInputs", "PolicyLoss", "TokenLosses", "policy_loss"]

POLICY_LOSSES: dict[str, PolicyLoss] = {"actor": ppo_clip, "gspo": gspo, "cispo": cispo, "sapo": sapo}


def policy_loss(name: str) -> PolicyLoss:
    """The loss that `algorithm.loss_type` names.

    Raises:
        UserError: unknown name.
    """
    if name not in POLICY_LOSSES:
        raise UserError(f"algorithm.loss_type: unknown '{name}'; use one of {', '.join(sorted(POLICY_LOSSES))}")
    return POLICY_LOSSES[name]
