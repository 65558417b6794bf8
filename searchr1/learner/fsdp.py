"""A policy or a critic sharded with PyTorch's FSDP2."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from searchr1.algorithms.entropy import TokenLogprobs
from searchr1.algorithms.sums import Sums
from searchr1.checkpoints.lora import LoraRecord, is_adapter
from searchr1.device import Device
from searchr1.errors import UserError
from searchr1.learner.attention import NAME, packed_model_inputs
from searchr1.learner.backend import T
from searchr1.learner.checkpoint import SAVE_TIMEOUT_S, load_state, save_state
from searchr1.learner.lora import check_resume, full_adapters, full_weights
from searchr1.learner.model import build_model, init_process_group, load_model, policy_logprobs, shard_model
from searchr1.learner.optimizer import build_optimizer, build_schedule, clip_gradients
from searchr1.learner.packing import PackedBatch
from searchr1.learner.stats import all_reduce_sums
from searchr1.learner.trainer_config import Resident, TrainerConfig


class FsdpModel:
    """A sharded model that gives log-probabilities; see `ScoringBackend` for the methods."""

    data_group: dist.ProcessGroup | None = None

    def __init__(self, model: nn.Module, device: Device) -> None:
        self.model = model
        self.device = device.torch_device()

    @classmethod
    def start_frozen(cls, model_path: str, trainer: TrainerConfig, device: Device) -> FsdpModel:
        """Join the process group and load a frozen model.

        Args:
            model_path: a folder or hub name.
            trainer: of the policy, whose precision and kernels it shares.
            device: where to compute.
        """
        init_process_group(device, trainer.megatron.distributed_timeout_minutes)
        model = load_model(model_path, device, precision=trainer.model.precision, trainable=False, kernels=trainer.fsdp)
        return cls(model, device)

    @torch.no_grad()
    def logprobs(self, batches: Sequence[PackedBatch], temperature: float) -> list[Tensor]:
        """Return log-probabilities [P] of each batch's policy tokens."""
        logprobs = [policy_logprobs(self.model, batch, temperature).logprobs_M for batch in batches]
        # Embedding and output layer stay gathered for a backward pass that does not come.
        self.model.reshard()  # type: ignore[operator]  # an FSDPModule since `shard_model`
        return logprobs


class FsdpTraining:
    """A sharded model with an optimizer, whatever is on top of the decoder; see `TrainingBackend` for the methods."""

    data_group: dist.ProcessGroup | None = None

    def __init__(self, model: nn.Module, device: Device, trainer: TrainerConfig) -> None:
        self.model = model
        self.device = device.torch_device()
        self._trainer = trainer
        self._saving: Future[Any] | None = None
        self.optimizer = build_optimizer(model, trainer.optim)
        self.schedule = build_schedule(self.optimizer, trainer.schedule, trainer.optim.lr, trainer.total_steps)

    def backward(self, loss: Tensor) -> None:
        """Add up the gradients of a micro-batch's loss over ranks."""
        # FSDP averages gradients over ranks; the loss is already a share of a global mean.
        (loss * dist.get_world_size()).backward()

    def share(self, sums: Sums) -> Sums:
        """Return sums over all ranks."""
        return all_reduce_sums(sums)

    @property
    def parameter_count(self) -> int:
        """Parameters of the whole model, without adapters."""
        return sum(parameter.numel() for name, parameter in self.model.named_parameters() if not is_adapter(name))

    def named_weights(self, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        """Yield full tensors under their Hugging Face names, on every rank; adapters merged, no tied output layer."""
        yield from full_weights(self.model, dtype)

    @property
    def dp_rank(self) -> int:
        """This rank, which trains on a share of its own."""
        return dist.get_rank()

    @property
    def is_dp_leader(self) -> bool:
        """True: every rank takes its own share."""
        return True

    def broadcast_from_dp_leader(self, value: T | None) -> T:
        """Return `value`; no other rank needs it."""
        assert value is not None
        return value

    def clip_gradients(self, max_norm: float) -> float:
        """Scale gradients down to `max_norm`. Return the norm before."""
        return clip_gradients(self.model, max_norm)

    def step(self) -> None:
        """Update the weights and the learning rate."""
        self.optimizer.step()
        self.schedule.step()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next update."""
        return float(self.schedule.get_last_lr()[0])

    def resident(self, kind: Resident) -> Iterator[Tensor]:
        """Yield this rank's shards, unless `actor.fsdp.cpu_offload` has them in host memory; gradients end with a step."""
        tensors: list[Tensor] = []
        if kind == "weight":
            tensors = list(self.model.parameters())
        elif kind == "optimizer":
            moments = (value for state in self.optimizer.state.values() for value in state.values())
            tensors = [value for value in moments if isinstance(value, Tensor) and value.numel() > 1]
        yield from (tensor for tensor in map(_local, tensors) if tensor.device.type == self.device.type)

    def save(self, folder: Path, in_background: bool = False) -> None:
        """Write what is trained, optimizer, schedule and random state into `folder` (checkpoint.py)."""
        self._saving = save_state(
            folder, self.model, self.optimizer, self.schedule, self._trainer.model_path, in_background=in_background
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
    """The policy; see `PolicyBackend` for the methods."""

    @classmethod
    def start(cls, trainer: TrainerConfig, device: Device) -> FsdpBackend:
        """Join the process group and load the policy."""
        init_process_group(device, trainer.megatron.distributed_timeout_minutes, trainer.fsdp.cpu_offload)
        torch.manual_seed(trainer.seed)
        model = load_model(
            trainer.model_path,
            device,
            precision=trainer.model.precision,
            reshard_after_forward=trainer.fsdp.reshard_after_forward,
            cpu_offload=trainer.fsdp.cpu_offload,
            gradient_checkpointing=trainer.model.gradient_checkpointing,
            lora=trainer.lora,
            kernels=trainer.fsdp,
        )
        return cls(model, device, trainer)

    def forward(self, batch: PackedBatch, temperature: float, with_entropy: bool) -> TokenLogprobs:
        """Return log-probabilities [P] of the policy tokens, and their entropies, with gradients."""
        return policy_logprobs(self.model, batch, temperature, with_entropy)

    def named_adapters(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield LoRA's matrices alone, whole, under peft's names, on every rank."""
        for name, full in full_adapters(self.model):
            yield name, full.to(dtype)

    def save(self, folder: Path, in_background: bool = False) -> None:
        """Write a checkpoint; with LoRA the adapters alone, and what they belong to."""
        if self._trainer.lora.rank and dist.get_rank() == 0:
            LoraRecord.of(self._trainer.model_path, self._trainer.lora).write(folder)
        super().save(folder, in_background)

    def load(self, folder: Path) -> None:
        """Go on from `save`; reject adapters of another kind or base model.

        Raises:
            UserError: they do not fit.
        """
        check_resume(folder, self._trainer.model_path, self._trainer.lora)
        super().load(folder)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class ValueModel(nn.Module):
    """A decoder with a linear head, which starts at 0: V of the state before each policy token."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.model = decoder
        self.config = decoder.config
        self.value_head = nn.Linear(decoder.config.hidden_size, 1, bias=False)
        nn.init.zeros_(self.value_head.weight)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Return values [P] in fp32."""
        hidden_TH = self.model(**packed_model_inputs(batch))[0][0]
        values_P: Tensor = self.value_head(hidden_TH[batch.policy_positions_P - 1]).squeeze(-1).float()
        return values_P

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Switch recomputation on, as transformers' models do."""
        self.model.gradient_checkpointing_enable(**kwargs)


class FsdpValueBackend(FsdpTraining):
    """The critic; see `ValueBackend` for the methods."""

    @classmethod
    def start(cls, trainer: TrainerConfig, device: Device) -> FsdpValueBackend:
        """Join the process group and load the decoder.

        Raises:
            UserError: there is no usable decoder.
        """
        from transformers import AutoModel

        init_process_group(device, trainer.megatron.distributed_timeout_minutes, trainer.fsdp.cpu_offload)
        torch.manual_seed(trainer.seed)
        try:
            decoder, folder = build_model(
                AutoModel, trainer.model_path, dtype=torch.float32, attention=NAME, decoder_only=True
            )
        except UserError as error:
            raise UserError(f"critic.model_path: {error}") from error
        model = shard_model(
            ValueModel(decoder),
            device,
            folder=folder,
            precision=trainer.model.precision,
            reshard_after_forward=trainer.fsdp.reshard_after_forward,
            cpu_offload=trainer.fsdp.cpu_offload,
            gradient_checkpointing=trainer.model.gradient_checkpointing,
            kernels=trainer.fsdp,
        )
        return cls(model, device, trainer)

    @torch.no_grad()
    def values(self, batches: Sequence[PackedBatch]) -> list[Tensor]:
        """Return values [P] of each batch's policy tokens."""
        return [self.model(batch) for batch in batches]

    def forward(self, batch: PackedBatch) -> Tensor:
        """Return values [P] of the policy tokens, with gradients."""
        values_P: Tensor = self.model(batch)
        return values_P
