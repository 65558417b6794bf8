"""A policy or a critic in Megatron-Core's tensor, pipeline and data parallelism."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from searchr1.algorithms.entropy import TokenLogprobs
from searchr1.algorithms.sums import Sums
from searchr1.checkpoints.mapping import hugging_face_shapes
from searchr1.checkpoints.megatron_source import check_megatron_checkpoint
from searchr1.checkpoints.model_shape import read_megatron_shape
from searchr1.checkpoints.weight_check import check_model_folder
from searchr1.device import Device
from searchr1.learner.backend import PolicyLoss, T, ValueLoss
from searchr1.learner.megatron.checkpoint import Trained, load_checkpoint, load_weights, save_checkpoint
from searchr1.learner.megatron.model import (
    build_model,
    first_layer_of_stage,
    gather_hugging_face,
    load_hugging_face,
    local_parameters,
)
from searchr1.learner.megatron.optimizer import build_ddp, build_optimizer, torch_optimizers
from searchr1.learner.megatron.parallel import Parallel
from searchr1.learner.megatron.vocab_parallel import vocab_parallel_logprobs
from searchr1.learner.model import init_process_group
from searchr1.learner.optimizer import lr_factor
from searchr1.learner.packing import PackedBatch
from searchr1.learner.trainer_config import Resident, TrainerConfig


class MegatronTraining:
    """One rank's part of a model, with its share of the optimizer, whatever is on top of the decoder.

    See `TrainingBackend` for the methods.
    """

    has_value_head = False

    def __init__(self, trainer: TrainerConfig, device: Device) -> None:
        settings = trainer.model
        self.device = device.torch_device()
        self._trainer = trainer
        self.layout = trainer.layout(dist.get_world_size())
        arch, hf_config = read_megatron_shape(trainer.model_path)
        arch.check_layout(self.layout.tensor_parallel, self.layout.pipeline_parallel, trainer.section)
        self.arch = replace(arch, value_head=self.has_value_head)
        self._parallel = Parallel(self.layout, trainer.seed, self.device)
        self.data_group: dist.ProcessGroup | None = self._parallel.data_group
        self.module = build_model(self.arch, hf_config, self.layout, settings, device, trainer.max_tokens)
        self.parameters = local_parameters(self.module, self.arch, first_layer_of_stage(self.arch, self.layout))
        if settings.megatron_checkpoint is not None:
            if not self.has_value_head:
                check_megatron_checkpoint(Path(settings.megatron_checkpoint), trainer.model_path)
            load_weights(self.module, Path(settings.megatron_checkpoint))
        else:
            check_model_folder(trainer.model_path, decoder_only=self.has_value_head)
            load_hugging_face(self.parameters, trainer.model_path, self.arch)
        self.model = build_ddp(self.module, trainer)
        self.optimizer = build_optimizer(self.model, trainer)
        self.module.config.grad_scale_func = self.optimizer.scale_loss
        self._lr_factor = lr_factor(trainer.schedule, trainer.optim.lr, trainer.total_steps)
        self._saving: Any = None
        self.updates = 0
        """Optimizer steps so far: what the learning rate goes by."""

    @classmethod
    def start(cls, trainer: TrainerConfig, device: Device) -> Self:
        """Join the process group and load the model.

        Raises:
            UserError: the model or the layout is not one that Megatron can do.
        """
        init_process_group(device, trainer.megatron.distributed_timeout_minutes)
        torch.manual_seed(trainer.seed)
        return cls(trainer, device)

    @property
    def dp_rank(self) -> int:
        """Data-parallel rank: which copy of the model this process is part of."""
        return self.layout.dp_rank(dist.get_rank())

    @property
    def is_dp_leader(self) -> bool:
        """Whether this is the first tensor-parallel rank of the first stage."""
        return self.layout.is_dp_leader(dist.get_rank())

    def broadcast_from_dp_leader(self, value: T | None) -> T:
        """Return the leader's value on all processes of the data-parallel rank."""
        return self._parallel.broadcast_from_dp_leader(value)

    def share(self, sums: Sums) -> Sums:
        """Return sums over all data, on every stage."""
        return self._parallel.share(sums)

    @torch.no_grad()
    def _forward(self, batches: Sequence[PackedBatch], read: Callable[[PackedBatch, Tensor], Tensor]) -> list[Tensor]:
        """Return what `read` makes of the model's output, [P] of each batch in fp32, on every rank."""
        values: list[Tensor] = []

        def keep(batch: PackedBatch, output: Tensor) -> Tensor:
            values.append(read(batch, output))
            return values[-1]

        self._run(batches, keep, forward_only=True)
        counts = [len(batch.policy_positions_P) for batch in batches]
        is_last = self._parallel.is_last_stage
        joined = torch.cat(values) if is_last else torch.empty(sum(counts), device=self.device)
        self._parallel.broadcast_from_last_stage(joined)
        return list(joined.split(counts))

    def _forward_backward(self, batches: Sequence[PackedBatch], loss: Callable[[PackedBatch, Tensor], Tensor]) -> None:
        """Add up the gradients of `loss`, of a batch and the model's output, over batches and ranks; only the last stage
        calls it."""
        self.model.zero_grad_buffer()
        self._run(batches, loss, forward_only=False)

    def _run(
        self, batches: Sequence[PackedBatch], loss: Callable[[PackedBatch, Tensor], Tensor], forward_only: bool
    ) -> None:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        # The schedule divides each loss by their number, and gradients are averaged over data-parallel ranks; ours are sums.
        scale = len(batches) * self.layout.data_parallel

        def finish(batch: PackedBatch, output: Tensor, non_loss_data: bool = False) -> Any:
            value = loss(batch, output)
            return value if non_loss_data else (value * scale, {})

        def step(iterator: Iterator[PackedBatch], model: Any) -> tuple[Tensor, Any]:
            batch = next(iterator)
            ids_T, positions_T, row = self._inputs(batch)
            self.module.output_positions_P = batch.policy_positions_P - 1
            output = model(ids_T[None], positions_T[None], None, packed_seq_params=row)
            return output, partial(finish, batch)

        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(batches),
            model=self.model,
            num_microbatches=len(batches),
            seq_length=self._trainer.max_tokens,
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _inputs(self, batch: PackedBatch) -> tuple[Tensor, Tensor, Any]:
        """Return ids, positions and borders, filled up to a multiple of the ranks of sequence parallelism."""
        from searchr1.learner.megatron.modules import PackedRow

        ids_T, positions_T, lengths, borders = batch.input_ids_T, batch.position_ids_T, batch.lengths, batch.cu_seqlens
        missing = -len(ids_T) % self.layout.tensor_parallel if self.module.config.sequence_parallel else 0
        if missing:
            filler = torch.arange(missing, device=ids_T.device)
            ids_T = torch.cat([ids_T, torch.zeros_like(filler)])
            positions_T, lengths = torch.cat([positions_T, filler]), (*lengths, missing)
            borders = torch.cat([borders, borders.new_full((1,), len(ids_T))])
        return ids_T, positions_T, PackedRow(lengths, borders)

    def clip_gradients(self, max_norm: float) -> float:
        """Unscale (fp16), and scale down to `max_norm`. Return the norm before, over all ranks."""
        overflow = self.optimizer.prepare_grads()
        if overflow:  # the loss scale was too high, and is lower from now on
            return math.inf
        return float(self.optimizer.clip_grad_norm(max_norm))

    def step(self) -> None:
        """Update the weights with gradients that `clip_gradients` has prepared."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.step_with_ready_grads()
        self.updates += 1

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next update."""
        return self._trainer.optim.lr * self._lr_factor(self.updates)

    @property
    def parameter_count(self) -> int:
        """Parameters of the whole model, as Hugging Face counts them."""
        return sum(math.prod(shape) for shape in hugging_face_shapes(self.arch).values())

    def named_weights(self, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        """Yield full tensors under their Hugging Face names on rank 0, empty shells elsewhere; a tensor at a time."""
        self._finish_gathering()
        for name, tensor in gather_hugging_face(self.parameters, self.arch, self.layout, self.device):
            yield name, tensor if dtype is None else tensor.to(dtype)

    def resident(self, kind: Resident) -> Iterator[Tensor]:
        """Yield this rank's tensors. In fp32 the weights are their own master copies and count as weights."""
        weights = {parameter.untyped_storage().data_ptr() for parameter in self.module.parameters()}
        if kind == "weight":
            yield from self.module.parameters()
        elif kind == "grad":
            yield from (buffer.grad_data for buffer in self.model.buffers)
        else:
            for optimizer in torch_optimizers(self.optimizer):
                masters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
                moments = [value for state in optimizer.state.values() for value in state.values()]
                for tensor in [*masters, *moments]:
                    if tensor.numel() > 1 and tensor.untyped_storage().data_ptr() not in weights:
                        yield tensor

    def save(self, folder: Path, in_background: bool = False) -> None:
        """Write a Megatron distributed checkpoint, which any layout can load."""
        self._finish_gathering()
        self._saving = save_checkpoint(
            Trained(self.module, self.optimizer), self.updates, self._trainer.model_path, folder, in_background
        )

    def finish_save(self) -> None:
        """Wait for the process that writes."""
        if self._saving is not None:
            self._saving.maybe_finalize_async_calls(blocking=True)
            self._saving = None

    def load(self, folder: Path) -> None:
        """Go on from `save`, also in another layout."""
        self.updates = load_checkpoint(Trained(self.module, self.optimizer), folder, self._trainer.section)

    def _finish_gathering(self) -> None:
        """Wait for updated weights, which with `overlap_param_gather` arrive with the next forward pass only."""
        if self.model.ddp_config.overlap_param_gather:
            self.model.start_param_sync(force_sync=True)


class MegatronBackend(MegatronTraining):
    """The policy; see `ScheduledPolicyBackend` for the methods."""

    def logprobs(self, batches: Sequence[PackedBatch], temperature: float) -> list[Tensor]:
        """Return log-probabilities [P] of each batch's policy tokens, on every rank."""
        return self._forward(
            batches, lambda batch, logits_PV: self._logprobs(batch, logits_PV, temperature, False).logprobs_M
        )

    def run_schedule(self, batches: Sequence[PackedBatch], temperature: float, with_entropy: bool, loss: PolicyLoss) -> None:
        """Add up the gradients of `loss` over batches and ranks; only the last stage calls it."""
        self._forward_backward(
            batches, lambda batch, logits_PV: loss(batch, self._logprobs(batch, logits_PV, temperature, with_entropy))
        )

    def named_adapters(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield nothing: all weights are trained."""
        return iter(())

    def _logprobs(self, batch: PackedBatch, logits_PV: Tensor, temperature: float, with_entropy: bool) -> TokenLogprobs:
        first = self._parallel.tensor_group.rank() * logits_PV.shape[1]
        # What is above the vocabulary is padding: no token.
        return vocab_parallel_logprobs(
            logits_PV[:, : max(0, self.arch.vocab_size - first)],
            batch.input_ids_T[batch.policy_positions_P],
            first,
            self._parallel.tensor_group,
            temperature,
            with_entropy,
        )


class MegatronValueBackend(MegatronTraining):
    """The critic; see `ScheduledValueBackend` for the methods."""

    has_value_head = True

    def values(self, batches: Sequence[PackedBatch]) -> list[Tensor]:
        """Return values [P] of each batch's policy tokens, on every rank."""
        return self._forward(batches, lambda _, values_P: values_P)

    def run_schedule(self, batches: Sequence[PackedBatch], loss: ValueLoss) -> None:
        """Add up the gradients of `loss` over batches and ranks; only the last stage calls it."""
        self._forward_backward(batches, loss)
