"""The critic's loss: squared error, clipped as in PPO. https://arxiv.org/abs/2005.12729 (section 3)"""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_value_loss(values_P: Tensor, old_values_P: Tensor, returns_P: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Return [P] max of (V - R)^2 and (clip(V, V_old - c, V_old + c) - R)^2, halved; and bool [P], where the second was
    larger.

    A value that has moved further than `clip` from the one that the advantages came from gets no gradient for moving on.

    Args:
        values_P: of the critic being trained, with its graph.
        old_values_P: of the critic before this step's updates.
        returns_P: what they should be.
        clip: c.
    """
    clipped_P = torch.clamp(values_P, old_values_P - clip, old_values_P + clip)
    plain_P, bounded_P = (values_P - returns_P).square(), (clipped_P - returns_P).square()
    return 0.5 * torch.maximum(plain_P, bounded_P), bounded_P > plain_P
