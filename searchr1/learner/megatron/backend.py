"""A policy or a critic on Megatron-Core, and its process groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from searchr1.algorithms.entropy import TokenLogprobs
from searchr1.config.layout import Layout
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


def start_megatron(layout: Layout, seed: int) -> Any:
    """Import Megatron (through the shim on a CPU), make its process groups, seed it. Returns its `parallel_state`.

    The default process group must exist.
    """
    from searchr1.learner.megatron import cpu_shim

    cpu_shim.prepare()
    # Imported here so that the shim reaches them all.
    import megatron.core.dist_checkpointing
    import megatron.core.distributed
    import megatron.core.models.gpt
    import megatron.core.optimizer
    import megatron.core.pipeline_parallel  # noqa: F401
    from megatron.core import parallel_state, tensor_parallel

    cpu_shim.adapt()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor_parallel,
            pipeline_model_parallel_size=layout.pipeline_parallel,
            create_gloo_process_groups=True,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
    assert dist.get_world_size() == layout.world
    return parallel_state
