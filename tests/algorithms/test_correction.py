"""The mismatch correction with the engine as the old policy, and what it needs (formulas: test_exact_losses.py)."""

from __future__ import annotations

import pytest
import torch
from support.padded import make_batch, ours

from searchr1.algorithms.aggregation import Denominators
from searchr1.algorithms.correction import CorrectionSettings
from searchr1.algorithms.loss import LossConfig, LossInputs, policy_gradient_loss
from searchr1.algorithms.policy_losses import ClipSettings

CLIP = ClipSettings(0.2, 0.28)


def test_with_the_engine_as_the_old_policy_only_what_is_dropped_applies():
    """The ratio is the importance weight already; multiplying once more would square it."""
    batch = make_batch(3)
    batch["old"] = batch["rollout"]
    plain, *_ = ours(batch, LossConfig(CLIP))
    truncate = CorrectionSettings("token", "truncate", upper=1.01)
    truncated, *_ = ours(batch, LossConfig(CLIP, correction=truncate, ratio_is_correction=True))
    assert truncated == plain
    mask = CorrectionSettings("geometric", "mask", 0.95, 1.05)
    _, gradient, metrics = ours(batch, LossConfig(CLIP, correction=mask, ratio_is_correction=True))
    assert 0 < metrics["correction_bounded"] < 1
    for row in range(len(gradient)):
        chosen = batch["mask"][row]
        mean = (batch["logprobs"] - batch["rollout"])[row][chosen].mean().exp()
        assert bool((gradient[row] == 0).all()) != (0.95 <= float(mean) <= 1.05)


def test_a_correction_without_the_engines_log_probabilities_is_an_error():
    with pytest.raises(ValueError, match="needs the engine's"):
        policy_gradient_loss(
            LossInputs(*[torch.zeros(1)] * 3, torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.long),
                       Denominators(1, 1, 1)),
            LossConfig(CLIP, correction=CorrectionSettings("token")),
        )  # fmt: skip
