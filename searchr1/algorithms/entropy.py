"""Log-probabilities of given tokens, and entropies, from logits, in little memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 24}
"""Logits worked on at a time, by the kind of device: beyond the logits and their gradient up to four fp32 tensors of that
size are needed (64 and 256 MiB). On a GPU smaller chunks would be done before the next kernel is launched."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Of M positions."""

    logprobs_M: Tensor
    """At least fp32."""
    entropy_M: Tensor | None
    """Of the sampling distribution, in nats; None if it was not asked for."""


def logprobs_from_logits(
    logits_MV: Tensor, targets_M: Tensor, temperature: float = 1.0, with_entropy: bool = False
) -> TokenLogprobs:
    """Log-softmax of `logits / temperature` at each row's target, and the rows' entropy.

    Works in fp32 (float64 for float64 logits) on a few rows at a time and keeps nothing but the logits for the
    backward pass, which allocates one gradient of the logits' shape and dtype.

    Args:
        logits_MV: [M, V], row m predicts `targets_M[m]` (the caller has shifted).
        targets_M: [M] int64.
        temperature: > 0.
        with_entropy: also the entropy, differentiable.

    Raises:
        ValueError: shapes do not fit or the temperature is not positive.
    """
    if logits_MV.dim() != 2 or targets_M.shape != logits_MV.shape[:1]:
        raise ValueError(f"logits {tuple(logits_MV.shape)} and targets {tuple(targets_M.shape)} do not fit")
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} is not positive")
    logprobs_M, entropy_M = _Logprobs.apply(logits_MV, targets_M, temperature, with_entropy)
    return TokenLogprobs(logprobs_M, entropy_M if with_entropy else None)


class _Logprobs(torch.autograd.Function):
    """d logp_t / d z_v = (1[v = t] - p_v) / T and d H / d z_v = -p_v (log p_v + H) / T."""

    @staticmethod
    def forward(
        ctx: Any, logits_MV: Tensor, targets_M: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(logits_MV.dtype, torch.float32)
        normaliser_M = torch.empty(targets_M.shape, dtype=dtype, device=logits_MV.device)
        logprobs_M = torch.empty_like(normaliser_M)
        entropy_M = torch.empty_like(normaliser_M) if with_entropy else normaliser_M.new_empty(0)
        for rows in row_chunks(logits_MV):
            scaled_CV = scaled(logits_MV[rows], dtype, temperature)
            normaliser_C = scaled_CV.logsumexp(-1)
            normaliser_M[rows] = normaliser_C
            logprobs_M[rows] = scaled_CV.gather(-1, targets_M[rows, None]).squeeze(-1) - normaliser_C
            if with_entropy:
                log_p_CV = scaled_CV.sub_(normaliser_C[:, None])
                entropy_M[rows] = _entropy(log_p_CV.exp(), log_p_CV)
        ctx.save_for_backward(logits_MV, targets_M, normaliser_M, entropy_M)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logprobs_M, entropy_M

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        grad_logprobs_M, grad_entropy_M = grads
        logits_MV, targets_M, normaliser_M, entropy_M = ctx.saved_tensors
        if grad_logprobs_M is None and grad_entropy_M is None:
            return None, None, None, None
        gradient_MV = torch.empty_like(logits_MV)
        for rows in row_chunks(logits_MV):
            log_p_CV = scaled(logits_MV[rows], normaliser_M.dtype, ctx.temperature).sub_(normaliser_M[rows, None])
            p_CV = log_p_CV.exp()
            if grad_logprobs_M is None:
                gradient_CV = torch.zeros_like(p_CV)
            else:
                gradient_CV = p_CV * -grad_logprobs_M[rows, None]
                gradient_CV.scatter_add_(-1, targets_M[rows, None], grad_logprobs_M[rows, None])
            if grad_entropy_M is not None:
                # xlogy's convention: where p underflowed to 0 its term is 0, also if the logit was -inf.
                term_CV = p_CV * (log_p_CV.clamp(min=torch.finfo(p_CV.dtype).min) + entropy_M[rows, None])
                gradient_CV.sub_(term_CV * grad_entropy_M[rows, None])
            gradient_MV[rows] = gradient_CV if ctx.temperature == 1.0 else gradient_CV.div_(ctx.temperature)
        return gradient_MV, None, None, None


def _entropy(p_CV: Tensor, log_p_CV: Tensor) -> Tensor:
    # The clamp makes 0 * -inf a 0.
    return -(p_CV * log_p_CV.clamp(min=torch.finfo(p_CV.dtype).min)).sum(-1)


def scaled(logits_CV: Tensor, dtype: torch.dtype, temperature: float) -> Tensor:
    """Return a new tensor of `logits / temperature`."""
    if logits_CV.dtype == dtype:
        return logits_CV / temperature
    converted_CV = logits_CV.to(dtype)
    return converted_CV if temperature == 1.0 else converted_CV.div_(temperature)


def row_chunks(logits_MV: Tensor) -> list[slice]:
    """Return how many rows to work on at a time, so that a chunk has about `CHUNK_ELEMENTS` logits."""
    rows, vocabulary = logits_MV.shape
    step = max(1, CHUNK_ELEMENTS[logits_MV.device.type] // max(1, vocabulary))
    return [slice(start, start + step) for start in range(0, rows, step)]
