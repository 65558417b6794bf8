"""A policy or a critic sharded with PyTorch's FSDP2."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from searchr1.algorithms.sums import Sums
from searchr1.checkpoints.lora import LoraRecord, is_adapter
from searchr1.config.schema import Config
from searchr1.config.schema_model import LoraConfig, LrSchedConfig, OptimConfig
from searchr1.device import Device
from searchr1.errors import UserError
from searchr1.learner.attention import NAME, packed_model_inputs
from searchr1.learner.backend import MicroBatchLoss, Resident, T, ValueLoss
from searchr1.learner.checkpoint import SAVE_TIMEOUT_S, load_state, save_state
from searchr1.learner.lora import check_resume, full_adapters, full_weights
from searchr1.learner.model import build_model, init_process_group, load_model, policy_logprobs, shard_model
from searchr1.learner.optimizer import build_optimizer, build_schedule, clip_gradients
from searchr1.learner.packing import PackedBatch
from searchr1.learner.stats import all_reduce_sums


class FsdpModel:
    """A sharded model that gives log-probabilities; see `ScoringBackend` for the methods."""

    data_group: dist.ProcessGroup | None = None

    def __init__(self, model: nn.Module, device: Device) -> None:
        self.model = model
        self.device = device.torch_device()

    @torch.no_grad()
    def forward(self, batches: Sequence[PackedBatch], temperature: float) -> list[Tensor]:
        """Log-probabilities [P] of each batch's policy tokens."""
        found = [policy_logprobs(self.model, batch, temperature).logprobs_M for batch in batches]
        # Of embedding and output layer, which stay gathered for a backward pass that does not come.
        self.model.reshard()  # type: ignore[operator]  # an FSDPModule since `shard_model`
        return found


class FsdpTraining:
    """A sharded model with an optimizer, whatever is on top of the decoder; see `TrainingBackend` for the methods."""

    data_group: dist.ProcessGroup | None = None

    def __init__(
        self,
        model: nn.Module,
        device: Device,
        optim: OptimConfig,
        lr_sched: LrSchedConfig,
        total_steps: int | None,
        model_path: str,
    ) -> None:
        self.model = model
        self.device = device.torch_device()
        self._model_path = model_path
        self._saving: Future[Any] | None = None
        self.optimizer = build_optimizer(model, optim)
        self.schedule = build_schedule(self.optimizer, lr_sched, optim.lr, total_steps)

    def _backward(self, batches: Sequence[PackedBatch], loss: Callable[[PackedBatch], Tensor]) -> None:
        """Add up gradients over batches and ranks."""
        for batch in batches:
            # FSDP averages gradients over ranks; the loss is already a share of a global mean.
            (loss(batch) * dist.get_world_size()).backward()

    def share(self, sums: Sums) -> Sums:
        """Over all ranks."""
        return all_reduce_sums(sums)

    @property
    def parameter_count(self) -> int:
        """Of the whole model, without adapters."""
        return sum(parameter.numel() for name, parameter in self.model.named_parameters() if not is_adapter(name))

    def named_weights(self, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        """Full tensors under their Hugging Face names, here on every rank; adapters merged, a tied output layer left out."""
        yield from full_weights(self.model, dtype)

    @property
    def replica(self) -> int:
        """Every rank trains on a share of its own."""
        return dist.get_rank()

    @property
    def leads_replica(self) -> bool:
        """Always."""
        return True

    def to_replica(self, value: T | None) -> T:
        """Nobody else needs it."""
        assert value is not None
        return value

    def clip_gradients(self, max_norm: float) -> float:
        """Scale gradients down to `max_norm`; the norm before."""
        return clip_gradients(self.model, max_norm)

    def step(self) -> None:
        """One update."""
        self.optimizer.step()
        self.schedule.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return float(self.schedule.get_last_lr()[0])

    def resident(self, kind: Resident) -> Iterator[Tensor]:
        """This rank's shards, unless `actor.fsdp.cpu_offload` has them in host memory; gradients do not outlive a step."""
        found: list[Tensor] = []
        if kind == "weight":
            found = list(self.model.parameters())
        elif kind == "optimizer":
            moments = (value for state in self.optimizer.state.values() for value in state.values())
            found = [value for value in moments if isinstance(value, Tensor) and value.numel() > 1]
        yield from (tensor for tensor in map(_local, found) if tensor.device.type == self.device.type)

    def save(self, folder: Path, in_background: bool = False) -> None:
        """Write what is trained, optimizer, schedule and random state into `folder` (checkpoint.py)."""
        self._saving = save_state(
            folder, self.model, self.optimizer, self.schedule, self._model_path, in_background=in_background
        )

    def finish_save(self) -> None:
        """Wait for the thread that writes."""
        if self._saving is not None:
            self._saving.result(SAVE_TIMEOUT_S)
            self._saving = None

    def load(self, folder: Path) -> None:
        """Go on from `save`, also with another number of ranks."""
        load_state(folder, self.model, self.optimizer, self.schedule)


class FsdpBackend(FsdpTraining, FsdpModel):
    """The policy."""

    def __init__(
        self,
        model: nn.Module,
        device: Device,
        optim: OptimConfig,
        lr_sched: LrSchedConfig,
        total_steps: int | None,
        model_path: str,
        lora: LoraConfig,
    ) -> None:
        super().__init__(model, device, optim, lr_sched, total_steps, model_path)
        self._lora = lora

    @classmethod
    def start(cls, config: Config, device: Device, total_steps: int | None) -> FsdpBackend:
        """Join the process group and load the policy."""
        init_process_group(device, config.actor.megatron.distributed_timeout_minutes, config.actor.fsdp.cpu_offload)
        torch.manual_seed(config.actor.seed)
        path = config.actor.model.path or config.rollout.model.model_path
        model = load_model(
            path,
            device,
            precision=config.actor.model.precision,
            reshard_after_forward=config.actor.fsdp.reshard_after_forward,
            cpu_offload=config.actor.fsdp.cpu_offload,
            gradient_checkpointing=config.actor.model.gradient_checkpointing,
            lora=config.actor.lora,
            kernels=config.actor.fsdp,
        )
        return cls(model, device, config.actor.optim, config.actor.lr_sched, total_steps, path, config.actor.lora)

    @staticmethod
    def start_reference(config: Config, device: Device) -> FsdpModel:
        """Join the process group and load the weights that training starts from, frozen."""
        init_process_group(device, config.actor.megatron.distributed_timeout_minutes)
        path = config.inference.model_path or config.actor.model.path or config.rollout.model.model_path
        precision, kernels = config.actor.model.precision, config.actor.fsdp
        return FsdpModel(load_model(path, device, precision=precision, trainable=False, kernels=kernels), device)

    def forward_backward(
        self, batches: Sequence[PackedBatch], temperature: float, with_entropy: bool, loss: MicroBatchLoss
    ) -> None:
        """Add up gradients over batches and ranks."""
        self._backward(batches, lambda batch: loss(batch, policy_logprobs(self.model, batch, temperature, with_entropy)))

    def named_adapters(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """LoRA's matrices alone, whole, under peft's names, here on every rank."""
        for name, full in full_adapters(self.model):
            yield name, full.to(dtype)

    def save(self, folder: Path, in_background: bool = False) -> None:
        """With LoRA the adapters alone, and what they belong to."""
        if self._lora.rank and dist.get_rank() == 0:
            LoraRecord.of(self._model_path, self._lora).write(folder)
        super().save(folder, in_background)

    def load(self, folder: Path) -> None:
        """Refuses adapters of another kind or base model."""
        check_resume(folder, self._model_path, self._lora)
        super().load(folder)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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
