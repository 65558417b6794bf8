"""The critic on Megatron-Core."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from searchr1.actor.backend import ValueLoss
from searchr1.actor.megatron.training import MegatronTraining
from searchr1.actor.packing import PackedBatch


class MegatronValueBackend(MegatronTraining):
    """See `ValueBackend` for the methods; the configuration is `critic_run` of the run's."""

    section = "critic"

    def values(self, batches: Sequence[PackedBatch]) -> list[Tensor]:
        """[P] of each batch's policy tokens, on every rank."""
        return self._forward(batches, lambda _, values_P: values_P)

    def forward_backward(self, batches: Sequence[PackedBatch], loss: ValueLoss) -> None:
        """Add up the gradients of `loss` over batches and ranks; only the last stage calls it."""
        self._forward_backward(batches, loss)
