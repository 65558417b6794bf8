"""Log-probabilities and entropies from logits whose vocabulary is spread over the tensor-parallel ranks.

Only three numbers a token cross the ranks (the maximum, the sum of exponentials, the target's logit; one more for the
entropy), never a row of logits. With a group of one this is `algorithms/entropy.py`, which its tests compare it with.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from searchr1.algorithms.entropy import TokenLogprobs, row_chunks, scaled


def vocab_parallel_logprobs(
    logits_MV: Tensor,
    targets_M: Tensor,
    first_id: int,
    group: dist.ProcessGroup,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> TokenLogprobs:
    """Return log-softmax of `logits / temperature` at each row's target, and the rows' entropy; the same on all ranks.

    Computes in fp32 (float64 for float64 logits), a few rows at a time. The gradient of the logits, of their shape and
    dtype, is all that the backward pass allocates; each rank gets its own part of it, and nothing is communicated.

    Args:
        logits_MV: [M, V_rank], this rank's part of the vocabulary; parts may differ in size, but not be empty.
        targets_M: [M] int64, ids of the whole vocabulary.
        first_id: the id of this rank's first column.
        group: the tensor-parallel ranks; they call together, with the same M.
        temperature: > 0.
        with_entropy: also the entropy, differentiable.
    """
    logprobs_M, entropy_M = _VocabParallel.apply(logits_MV, targets_M, first_id, group, temperature, with_entropy)
    return TokenLogprobs(logprobs_M, entropy_M if with_entropy else None)


class _VocabParallel(torch.autograd.Function):
    """d logp_t / d z_v = (1[v = t] - p_v) / T and d H / d z_v = -p_v (log p_v + H) / T, for this rank's v."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_MV: Tensor,
        targets_M: Tensor,
        first_id: int,
        group: dist.ProcessGroup,
        temperature: float,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(logits_MV.dtype, torch.float32)
        columns_M = targets_M - first_id
        mine_M = (columns_M >= 0) & (columns_M < logits_MV.shape[1])
        columns_M = columns_M.clamp(0, logits_MV.shape[1] - 1)

        # The largest logit is exact in the logits' own precision; dividing by T > 0 keeps it the largest.
        largest_M = logits_MV.amax(-1).to(dtype) / temperature if len(logits_MV) else logits_MV.new_zeros(0, dtype=dtype)
        dist.all_reduce(largest_M, op=dist.ReduceOp.MAX, group=group)
        # Rows of: sum of exponentials, target's logit, sum of exponentials times logits.
        sums_SM = torch.zeros(3 if with_entropy else 2, len(targets_M), dtype=dtype, device=logits_MV.device)
        for rows in row_chunks(logits_MV):
            scaled_CV = scaled(logits_MV[rows], dtype, temperature).sub_(largest_M[rows, None])
            target_C = scaled_CV.gather(-1, columns_M[rows, None]).squeeze(-1)
            sums_SM[1, rows] = target_C.masked_fill(~mine_M[rows], 0.0)
            exp_CV = scaled_CV.exp()
            sums_SM[0, rows] = exp_CV.sum(-1)
            if with_entropy:
                sums_SM[2, rows] = (exp_CV * _finite(scaled_CV)).sum(-1)
        dist.all_reduce(sums_SM, group=group)
        log_sum_M = sums_SM[0].log()
        entropy_M = log_sum_M - sums_SM[2] / sums_SM[0] if with_entropy else sums_SM.new_empty(0)
        ctx.save_for_backward(logits_MV, columns_M, mine_M, largest_M + log_sum_M, entropy_M)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return sums_SM[1] - log_sum_M, entropy_M

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None, None, None]:
        grad_logprobs_M, grad_entropy_M = grads
        logits_MV, columns_M, mine_M, normaliser_M, entropy_M = ctx.saved_tensors
        if grad_logprobs_M is None and grad_entropy_M is None:
            return None, None, None, None, None, None
        gradient_MV = torch.empty_like(logits_MV)
        for rows in row_chunks(logits_MV):
            log_p_CV = scaled(logits_MV[rows], normaliser_M.dtype, ctx.temperature).sub_(normaliser_M[rows, None])
            p_CV = log_p_CV.exp()
            if grad_logprobs_M is None:
                gradient_CV = torch.zeros_like(p_CV)
            else:
                gradient_CV = p_CV * -grad_logprobs_M[rows, None]
                at_target_C = grad_logprobs_M[rows].masked_fill(~mine_M[rows], 0.0)
                gradient_CV.scatter_add_(-1, columns_M[rows, None], at_target_C[:, None])
            if grad_entropy_M is not None:
                gradient_CV.sub_(p_CV * (_finite(log_p_CV) + entropy_M[rows, None]) * grad_entropy_M[rows, None])
            gradient_MV[rows] = gradient_CV if ctx.temperature == 1.0 else gradient_CV.div_(ctx.temperature)
        return gradient_MV, None, None, None, None, None


def _finite(values: Tensor) -> Tensor:
    """Return values without -inf, so that 0 * -inf is 0."""
    return values.clamp(min=torch.finfo(values.dtype).min)
