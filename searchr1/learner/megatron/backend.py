"""A policy or a critic on Megatron-Core."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from searchr1.algorithms.entropy import TokenLogprobs
from searchr1.learner.backend import MicroBatchLoss, ValueLoss
from searchr1.learner.megatron.training import MegatronTraining
from searchr1.learner.megatron.vocab_parallel import vocab_parallel_logprobs
from searchr1.learner.packing import PackedBatch


class MegatronBackend(MegatronTraining):
    """See `Backend` for the methods."""

    def forward(self, batches: Sequence[PackedBatch], temperature: float) -> list[Tensor]:
        """Log-probabilities [P] of each batch's policy tokens, on every rank."""
        return self._forward(
            batches, lambda batch, logits_PV: self._logprobs(batch, logits_PV, temperature, False).logprobs_M
        )

    def forward_backward(
        self, batches: Sequence[PackedBatch], temperature: float, with_entropy: bool, loss: MicroBatchLoss
    ) -> None:
        """Add up the gradients of `loss` over batches and ranks; only the last stage calls it."""
        self._forward_backward(
            batches, lambda batch, logits_PV: loss(batch, self._logprobs(batch, logits_PV, temperature, with_entropy))
        )

    def named_adapters(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """None: all weights are trained (config/check_lora.py)."""
        return iter(())

    def _logprobs(self, batch: PackedBatch, logits_PV: Tensor, temperature: float, with_entropy: bool) -> TokenLogprobs:
        first = self._tensor_group.rank() * logits_PV.shape[1]
        # What is above the vocabulary is padding: no token.
        return vocab_parallel_logprobs(
            logits_PV[:, : max(0, self.arch.vocab - first)],
            batch.input_ids_T[batch.policy_positions_P],
            first,
            self._tensor_group,
            temperature,
            with_entropy,
        )


class MegatronValueBackend(MegatronTraining):
    """See `ValueBackend` for the methods; the configuration is `critic_run` of the run's."""

    section = "critic"

    def values(self, batches: Sequence[PackedBatch]) -> list[Tensor]:
        """[P] of each batch's policy tokens, on every rank."""
        return self._forward(batches, lambda _, values_P: values_P)

    def forward_backward(self, batches: Sequence[PackedBatch], loss: ValueLoss) -> None:
        """Add up the gradients of `loss` over batches and ranks; only the last stage calls it."""
        self._forward_backward(batches, loss)
