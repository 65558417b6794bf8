"""The loss of a micro-batch, whatever it consists of, reads nothing back from the device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.host_reads import HostReads

from searchr1.algorithms.aggregation import Denominators
from searchr1.algorithms.correction import CorrectionSettings
from searchr1.algorithms.loss import LossConfig, LossInputs, policy_gradient_loss
from searchr1.algorithms.mismatch import mismatch_sums
from searchr1.algorithms.policy_losses import ClipSettings

LOSSES = ("actor", "gspo", "cispo", "sapo")
CONFIG = LossConfig(ClipSettings(0.2, 0.2), kl_beta=0.1, entropy_bonus=0.01)
CONFIGS = {loss: replace(CONFIG, loss_type=loss, aggregation="seq-mean-token-mean") for loss in LOSSES}
CONFIGS |= {
    f"{level}-{bound}": replace(CONFIG, correction=CorrectionSettings(level, bound, 0.9, 1.1, veto=0.6))
    for level, bound in (("token", "truncate"), ("sequence", "reject"), ("geometric", "mask"))
}
CONFIGS |= {f"llds-{gate}": replace(CONFIG, llds_coef=0.1, llds_gate=gate) for gate in ("action", "response")}


def make_inputs() -> LossInputs:
    generator = torch.Generator().manual_seed(0)
    segments_T = torch.repeat_interleave(torch.arange(4), torch.tensor([9, 2, 7, 6]))
    mask_T = torch.rand(24, generator=generator) < 0.6
    mask_T[segments_T == 1] = False  # a sequence without policy tokens
    mask_T[segments_T == 3] = False  # and one at the end
    logprobs_T, old_T, rollout_T, ref_T = -3 + 0.2 * torch.randn(4, 24, generator=generator)
    return LossInputs(
        logprobs_T=logprobs_T.requires_grad_(),
        old_logprobs_T=old_T,
        advantages_T=torch.randn(24, generator=generator),
        loss_mask_T=mask_T,
        segment_ids_T=segments_T,
        denominators=Denominators(tokens=40, sequences=5),
        rollout_logprobs_T=rollout_T,
        ref_logprobs_T=ref_T,
        entropy_T=torch.rand(24, generator=generator),
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_known_positions_and_counts_change_no_loss_and_make_nobody_wait(name: str) -> None:
    inputs = make_inputs()
    counting = policy_gradient_loss(inputs, CONFIGS[name])
    (expected,) = torch.autograd.grad(counting.loss, inputs.logprobs_T)
    positions_P = inputs.loss_mask_T.nonzero().squeeze(-1)
    known = replace(inputs, policy_positions_P=positions_P, sequences=4)
    watch = HostReads()
    with watch:
        found = policy_gradient_loss(known, CONFIGS[name])
        (gradient,) = torch.autograd.grad(found.loss, inputs.logprobs_T)
        mismatch_sums(inputs.old_logprobs_T, inputs.old_logprobs_T, positions_P)
    assert watch.found == []
    assert torch.equal(found.loss, counting.loss)
    assert torch.equal(gradient, expected)
    assert found.sums.totals == counting.sums.totals


def test_what_is_counted() -> None:
    with HostReads() as watch:
        values = torch.arange(3.0)
        assert [bool(values.any()), float(values[1]), values.tolist(), len(values.nonzero())] == [True, 1.0, [0, 1, 2], 2]
        values[values > 1] = 0
    kinds = [place.split()[0] for place in watch.found]
    assert kinds == ["_local_scalar_dense", "_local_scalar_dense", "tolist", "nonzero"], kinds
