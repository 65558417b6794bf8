"""Training in Megatron-Core's tensor, pipeline and data parallelism, whatever is on top of the decoder."""

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

from searchr1.algorithms.sums import Sums
from searchr1.checkpoints.megatron_source import check_megatron_checkpoint
from searchr1.checkpoints.model_shape import read_architecture
from searchr1.checkpoints.weight_check import check_model_folder
from searchr1.config.layout import Layout, actor_layout
from searchr1.config.schema import Config
from searchr1.device import Device
from searchr1.learner.backend import Resident, T
from searchr1.learner.megatron.checkpoint import load_checkpoint, load_weights, save_checkpoint
from searchr1.learner.megatron.export import gather_hugging_face
from searchr1.learner.megatron.model import build_model, first_layer_of_stage, load_hugging_face, local_parameters
from searchr1.learner.megatron.optimizer import build_ddp, build_optimizer, torch_optimizers
from searchr1.learner.megatron.parallel import start_megatron
from searchr1.learner.model import init_process_group
from searchr1.learner.optimizer import lr_factor
from searchr1.learner.packing import PackedBatch
from searchr1.learner.stats import all_reduce_sums


class MegatronTraining:
    """One rank's part of a model, with its share of the optimizer; see `TrainingBackend` for the methods."""

    section = "actor"
    """Of the YAML, for messages."""

    def __init__(self, config: Config, device: Device, total_steps: int | None) -> None:
        settings = config.actor.model
        self.device = device.torch_device()
        self.model_path = settings.path or config.rollout.model.model_path
        self.layout: Layout = actor_layout(config, dist.get_world_size(), self.section)
        arch, hf_config = read_architecture(self.model_path)
        arch.check_layout(self.layout.tensor_parallel, self.layout.pipeline_parallel, self.section)
        self.arch = replace(arch, value_head=self.section == "critic")
        self._parallel = start_megatron(self.layout, config.actor.seed)
        self.data_group: dist.ProcessGroup | None = self._parallel.get_data_parallel_group()
        self._tensor_group = self._parallel.get_tensor_model_parallel_group()
        self._is_last_stage = self._parallel.is_pipeline_last_stage()

        self._max_tokens = config.runner.max_tokens_per_mbs
        self.module = build_model(self.arch, hf_config, self.layout, settings, device, self._max_tokens)
        self.parameters = local_parameters(self.module, self.arch, first_layer_of_stage(self.arch, self.layout))
        if settings.megatron_checkpoint is not None:
            if self.section == "actor":
                check_megatron_checkpoint(Path(settings.megatron_checkpoint), self.model_path)
            load_weights(self.module, Path(settings.megatron_checkpoint))
        else:
            check_model_folder(self.model_path, decoder_only=self.arch.value_head)
            load_hugging_face(self.parameters, self.model_path, self.arch)
        self.model = build_ddp(self.module, config.actor)
        self.optimizer = build_optimizer(self.model, config.actor)
        self.module.config.grad_scale_func = self.optimizer.scale_loss
        self._lr_factor = lr_factor(config.actor.lr_sched, config.actor.optim.lr, total_steps)
        self._peak_lr = config.actor.optim.lr
        self._saving: Any = None
        self.updates = 0
        """Optimizer steps so far: what the learning rate goes by."""

    @classmethod
    def start(cls, config: Config, device: Device, total_steps: int | None) -> Self:
        """Join the process group and load the model.

        Raises:
            UserError: the model or the layout is not one that Megatron can do.
        """
        init_process_group(device, config.actor.megatron.distributed_timeout_minutes)
        torch.manual_seed(config.actor.seed)
        return cls(config, device, total_steps)

    @property
    def replica(self) -> int:
        """Which data-parallel copy of the model this rank is part of."""
        return self.layout.data_rank(dist.get_rank())

    @property
    def leads_replica(self) -> bool:
        """Whether this is the first tensor-parallel rank of the first stage."""
        return self.layout.leads(dist.get_rank())

    def to_replica(self, value: T | None) -> T:
        """What the replica's first rank has, on all its ranks."""
        box = [value]
        group = self._parallel.get_model_parallel_group()
        if group.size() > 1:
            dist.broadcast_object_list(box, dist.get_global_rank(group, 0), group, device=self.device)
        assert box[0] is not None
        return box[0]

    @torch.no_grad()
    def _forward(self, batches: Sequence[PackedBatch], read: Callable[[PackedBatch, Tensor], Tensor]) -> list[Tensor]:
        """What `read` makes of the model's output, [P] of each batch in fp32, on every rank."""
        found: list[Tensor] = []

        def keep(batch: PackedBatch, output: Tensor) -> Tensor:
            found.append(read(batch, output))
            return found[-1]

        self._run(batches, keep, forward_only=True)
        counts = [len(batch.policy_positions_P) for batch in batches]
        joined = torch.cat(found) if self._is_last_stage else torch.empty(sum(counts), device=self.device)
        self._broadcast_from_last_stage(joined)
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

        # The schedule divides each loss by their number, and gradients are averaged over replicas; ours are sums.
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
            seq_length=self._max_tokens,
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _inputs(self, batch: PackedBatch) -> tuple[Tensor, Tensor, Any]:
        """Ids, positions and borders; sequence parallelism wants a multiple of its ranks, which a filler sequence makes."""
        from searchr1.learner.megatron.modules import PackedRow

        ids_T, positions_T, lengths, borders = batch.input_ids_T, batch.position_ids_T, batch.lengths, batch.cu_seqlens
        missing = -len(ids_T) % self.layout.tensor_parallel if self.module.config.sequence_parallel else 0
        if missing:
            filler = torch.arange(missing, device=ids_T.device)
            ids_T = torch.cat([ids_T, torch.zeros_like(filler)])
            positions_T, lengths = torch.cat([positions_T, filler]), (*lengths, missing)
            borders = torch.cat([borders, borders.new_full((1,), len(ids_T))])
        return ids_T, positions_T, PackedRow(lengths, borders)

    def share(self, sums: Sums) -> Sums:
        """Over all replicas, known to every stage."""
        if self._is_last_stage:
            sums = all_reduce_sums(sums, self.data_group)
        if self.layout.pipeline_parallel == 1:
            return sums
        names = [[sorted(sums.totals), sorted(sums.peaks)]]
        dist.broadcast_object_list(names, self._last_stage_rank, self._pipeline_group, device=self.device)
        totals, peaks = names[0]
        count = len(totals) + len(peaks)
        values = torch.empty(count, dtype=torch.float64, device=self.device)
        if self._is_last_stage:
            values = torch.stack([*(sums.totals[name] for name in totals), *(sums.peaks[name] for name in peaks)])
        self._broadcast_from_last_stage(values)
        each = values.unbind()
        return Sums(dict(zip(totals, each[: len(totals)], strict=True)), dict(zip(peaks, each[len(totals) :], strict=True)))

    def clip_gradients(self, max_norm: float) -> float:
        """Unscale (fp16), and scale down to `max_norm`; the norm before, over all ranks."""
        overflow = self.optimizer.prepare_grads()
        if overflow:  # the loss scale was too high, and is lower from now on
            return math.inf
        return float(self.optimizer.clip_grad_norm(max_norm))

    def step(self) -> None:
        """One update with gradients that `clip_gradients` has prepared."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.step_with_ready_grads()
        self.updates += 1

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        return self._peak_lr * self._lr_factor(self.updates)

    @property
    def parameter_count(self) -> int:
        """Of the whole model, as Hugging Face has it."""
        from searchr1.checkpoints.mapping import hugging_face_shapes

        return sum(math.prod(shape) for shape in hugging_face_shapes(self.arch).values())

    def named_weights(self, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        """Full tensors under their Hugging Face names on rank 0, empty shells elsewhere; a tensor at a time."""
        self._finish_gathering()
        for name, tensor in gather_hugging_face(self.parameters, self.arch, self.layout, self.device):
            yield name, tensor if dtype is None else tensor.to(dtype)

    def resident(self, kind: Resident) -> Iterator[Tensor]:
        """This rank's tensors. In fp32 the weights are their own master copies and count as weights."""
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
        self._saving = save_checkpoint(self, folder, in_background)

    def finish_save(self) -> None:
        """Wait for the process that writes."""
        if self._saving is not None:
            self._saving.maybe_finalize_async_calls(blocking=True)
            self._saving = None

    def load(self, folder: Path) -> None:
        """Go on from `save`, also in another layout."""
        load_checkpoint(self, folder)

    def _finish_gathering(self) -> None:
        """With `overlap_param_gather` the updated weights arrive with the next forward pass only."""
        if self.model.ddp_config.overlap_param_gather:
            self.model.start_param_sync(force_sync=True)

    @property
    def _pipeline_group(self) -> dist.ProcessGroup:
        group: dist.ProcessGroup = self._parallel.get_pipeline_model_parallel_group()
        return group

    @property
    def _last_stage_rank(self) -> int:
        rank: int = self._parallel.get_pipeline_model_parallel_last_rank()
        return rank

    def _broadcast_from_last_stage(self, values: Tensor) -> None:
        if self.layout.pipeline_parallel > 1:
            dist.broadcast(values, self._last_stage_rank, self._pipeline_group)
