"""Importance weights for the mismatch between the engine that sampled and the model that trains.

The engine and the trainer compute slightly different probabilities for the same weights (other kernels, other precision),
so the sampled tokens are off-policy from the start. With d = log p_train - log p_rollout of a policy token, its loss is
multiplied by w, without a gradient through w:

    token       w_t = e^(d_t)                    unbiased per token, https://fengyao.notion.site/off-policy-rl (TIS)
    sequence    w   = e^(sum of d over the sequence)      unbiased for the sequence, high variance
    geometric   w   = e^(mean of d over the sequence)     a length-independent measure, for masking

and w is kept in bounds: `truncate` takes min(w, upper), `clip` moves it into [lower, upper], `mask` makes it 0 outside
(masked importance sampling), `reject` makes it 1 inside and 0 outside (with `sequence` or `geometric`: whole sequences are
kept or dropped). A `veto` drops a sequence with any token's e^d below it.
Dropped tokens still count in the loss's denominators: a batch with many of them learns less, not louder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from searchr1.algorithms.aggregation import tokens_of_sequences
from searchr1.algorithms.kl import EXPONENT_LIMIT
from searchr1.algorithms.names import CorrectionBound, CorrectionLevel


@dataclass(frozen=True, slots=True)
class CorrectionSettings:
    """The `algorithm.mismatch_correction` keys."""

    level: CorrectionLevel
    bound: CorrectionBound = "truncate"
    lower: float = 0.0
    """0 is not a bound."""
    upper: float = 2.0
    veto: float = 0.0
    """0 is off."""


@dataclass(frozen=True, slots=True)
class Correction:
    """Of P policy tokens."""

    weights_P: Tensor
    """What the loss is multiplied by; no gradient."""
    bounded_P: Tensor
    """bool: the weight was changed by its bounds."""
    vetoed_P: Tensor
    """bool: the token belongs to a sequence that was dropped by the veto."""


def correction_weights(
    d_P: Tensor, segment_ids_P: Tensor, settings: CorrectionSettings, sequences: int | None = None
) -> Correction:
    """Return the weights of one micro-batch's policy tokens; sequences must lie whole within it.

    Args:
        d_P: log-probability of the training model (with the weights that sampled) minus the engine's.
        segment_ids_P: int, which sequence a token belongs to.
        settings: see the module.
        sequences: how many there are; None counts them, for which the host waits for a GPU.
    """
    d_P = d_P.detach()
    if sequences is None:
        sequences = int(segment_ids_P.max()) + 1 if len(segment_ids_P) else 0
    exponent_P = d_P
    if settings.level != "token":
        sum_S = d_P.new_zeros(sequences).index_add_(0, segment_ids_P, d_P)
        if settings.level == "geometric":
            sum_S = sum_S / tokens_of_sequences(segment_ids_P, sequences).clamp(min=1).to(sum_S.dtype)
        exponent_P = sum_S[segment_ids_P]
    raw_P = exponent_P.clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT).exp()
    above_P, below_P = raw_P > settings.upper, raw_P < settings.lower
    if settings.bound == "truncate":
        bounded_P, weights_P = above_P, raw_P.clamp(max=settings.upper)
    elif settings.bound == "clip":
        bounded_P, weights_P = above_P | below_P, raw_P.clamp(settings.lower, settings.upper)
    else:
        bounded_P = above_P | below_P
        kept_P = torch.ones_like(raw_P) if settings.bound == "reject" else raw_P
        weights_P = kept_P.masked_fill(bounded_P, 0.0)
    vetoed_P = torch.zeros_like(bounded_P)
    if settings.veto > 0:
        catastrophic_P = d_P.clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT).exp() < settings.veto
        vetoed_S = torch.zeros(sequences, dtype=torch.int64, device=d_P.device)
        vetoed_P = (vetoed_S.index_add_(0, segment_ids_P, catastrophic_P.long()) > 0)[segment_ids_P]
        weights_P = weights_P.masked_fill(vetoed_P, 0.0)
    return Correction(weights_P, bounded_P, vetoed_P)
