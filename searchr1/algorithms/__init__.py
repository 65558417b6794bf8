"""Advantages, losses and their measurements: pure functions on tensors, nothing but torch."""

from typing import TYPE_CHECKING

from searchr1.exports import export

if TYPE_CHECKING:
    from searchr1.algorithms.advantages import compute_advantages
    from searchr1.algorithms.advantages.inputs import AdvantageInputs
    from searchr1.algorithms.loss import LossConfig, LossInputs, LossOutput, policy_gradient_loss
    from searchr1.algorithms.policy_losses.inputs import PolicyInputs
else:
    __getattr__, __dir__ = export(
        __name__,
        {
            "advantages": ["compute_advantages"],
            "advantages.inputs": ["AdvantageInputs"],
            "loss": ["LossConfig", "LossInputs", "LossOutput", "policy_gradient_loss"],
            "policy_losses.inputs": ["PolicyInputs"],
        },
    )

__all__ = [
    "AdvantageInputs",
    "LossConfig",
    "LossInputs",
    "LossOutput",
    "PolicyInputs",
    "compute_advantages",
    "policy_gradient_loss",
]
