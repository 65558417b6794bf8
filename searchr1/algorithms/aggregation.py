"""From one loss per token to one loss per mini-batch, whatever way the mini-batch is cut up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from searchr1.algorithms.names import LossAggregation
from searchr1.errors import UserError


@dataclass(frozen=True, slots=True)
class Denominators:
    """What a mini-batch's loss is divided by, counted over all ranks and all micro-batches."""

    tokens: int
    """Policy tokens."""
    sequences: int
    """Sequences with at least one policy token."""
    longest: int = 1
    """Policy tokens that a sequence may have at most; a constant of the run, for `seq-mean-token-sum-norm`."""


def check_aggregation(name: str) -> LossAggregation:
    """Check a name of `algorithm.loss_agg_func` and return it.

    Raises:
        UserError: unknown name.
    """
    for known in get_args(LossAggregation):
        if name == known:
            return name  # type: ignore[return-value]
    raise UserError("algorithm.loss_agg_func", f"unknown '{name}'; use one of {', '.join(get_args(LossAggregation))}")


def token_weights(
    aggregation: LossAggregation, segment_ids_P: Tensor, denominators: Denominators, sequences: int | None = None
) -> Tensor:
    """Weight of each policy token; the loss is the sum of weight times token loss.

    Because the denominators are global, the sum over all micro-batches and ranks is the loss of the whole
    mini-batch: packing, micro-batch size and data-parallel size change nothing. A sequence must lie whole within
    one call.

    Args:
        aggregation: `token-mean`: every token alike. `seq-mean-token-sum`: sum over a sequence's tokens, mean over
            sequences. `seq-mean-token-mean`: mean over a sequence's tokens, then mean over sequences.
            `seq-mean-token-sum-norm`: sum over a sequence's tokens by the longest possible length, then mean over
            sequences, so that no response is favoured for its length (https://arxiv.org/abs/2503.20783).
        segment_ids_P: [P] int, the sequence of each policy token; numbers start at 0.
        denominators: of the whole mini-batch.
        sequences: how many there are here; None counts them, for which the host waits for a GPU.

    Returns:
        [P] float64 weights.
    """
    # max(1, ·): a mini-batch without any policy token has loss 0, not NaN.
    all_sequences = max(1, denominators.sequences)
    weights_P = torch.ones(segment_ids_P.shape, dtype=torch.float64, device=segment_ids_P.device)
    if aggregation == "token-mean":
        return weights_P / max(1, denominators.tokens)
    if aggregation == "seq-mean-token-sum":
        return weights_P / all_sequences
    if aggregation == "seq-mean-token-sum-norm":
        return weights_P / (all_sequences * max(1, denominators.longest))
    tokens_S = tokens_of_sequences(segment_ids_P, sequences)
    return weights_P / (tokens_S[segment_ids_P.long()] * all_sequences)


def tokens_of_sequences(segment_ids_P: Tensor, sequences: int | None) -> Tensor:
    """Count the tokens of each sequence, [S] int64; `sequences` None makes S as large as the numbers need."""
    if sequences is None:
        return torch.bincount(segment_ids_P)
    return torch.zeros(sequences, dtype=torch.int64, device=segment_ids_P.device).index_add_(
        0, segment_ids_P, torch.ones_like(segment_ids_P, dtype=torch.int64)
    )
