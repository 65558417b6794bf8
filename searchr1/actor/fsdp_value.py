"""A critic on FSDP2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from searchr1.actor.attention import NAME, packed_model_inputs
from searchr1.actor.backend import ValueLoss
from searchr1.actor.fsdp import FsdpTraining
from searchr1.actor.loading import build_model
from searchr1.actor.model import init_process_group, shard_model
from searchr1.actor.packing import PackedBatch
from searchr1.config.schema import Config
from searchr1.device import Device
from searchr1.errors import UserError


class ValueModel(nn.Module):
    """V of the state before each policy token: the decoder's hidden state there, through a linear head that starts at 0."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.model = decoder
        self.config = decoder.config
        self.value_head = nn.Linear(decoder.config.hidden_size, 1, bias=False)
        nn.init.zeros_(self.value_head.weight)

    def forward(self, batch: PackedBatch) -> Tensor:
        """[P] in fp32."""
        hidden_TH = self.model(**packed_model_inputs(batch))[0][0]
        values_P: Tensor = self.value_head(hidden_TH[batch.policy_positions_P - 1]).squeeze(-1).float()
        return values_P

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """As transformers' models have it."""
        self.model.gradient_checkpointing_enable(**kwargs)


class FsdpValueBackend(FsdpTraining):
    """See `ValueBackend` for the methods."""

    @classmethod
    def start(cls, config: Config, device: Device, total_steps: int | None) -> FsdpValueBackend:
        """Join the process group and load the decoder.

        Args:
            config: `critic_run` of the run's.
            device: where to compute.
            total_steps: optimizer steps of the whole run.

        Raises:
            UserError: there is no usable decoder.
        """
        from transformers import AutoModel

        actor = config.actor
        init_process_group(device, actor.megatron.distributed_timeout_minutes, actor.fsdp.cpu_offload)
        torch.manual_seed(actor.seed)
        path = actor.model.path or config.rollout.model.model_path
        try:
            decoder, folder = build_model(AutoModel, path, dtype=torch.float32, attention=NAME, decoder_only=True)
        except UserError as error:
            raise UserError(f"critic.model_path: {error}") from error
        model = shard_model(
            ValueModel(decoder),
            device,
            folder=folder,
            precision=actor.model.precision,
            reshard_after_forward=actor.fsdp.reshard_after_forward,
            cpu_offload=actor.fsdp.cpu_offload,
            gradient_checkpointing=actor.model.gradient_checkpointing,
            kernels=actor.fsdp,
        )
        return cls(model, device, actor.optim, actor.lr_sched, total_steps, path)

    @torch.no_grad()
    def values(self, batches: Sequence[PackedBatch]) -> list[Tensor]:
        """[P] of each batch."""
        return [self.model(batch) for batch in batches]

    def forward_backward(self, batches: Sequence[PackedBatch], loss: ValueLoss) -> None:
        """Add up gradients over batches and ranks."""
        self._backward(batches, lambda batch: loss(batch, self.model(batch)))
