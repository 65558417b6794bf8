"""PPO's critic: a decoder with a scalar head on FSDP2, whatever trains the policy."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from searchr1.actor.attention import packed_model_inputs
from searchr1.actor.batch_stats import all_reduce_max, all_reduce_sums
from searchr1.actor.checkpoint import load_state, save_state, told_as_disk_trouble
from searchr1.actor.model import init_process_group, shard_model
from searchr1.actor.optimizer import build_optimizer, build_schedule, clip_gradients
from searchr1.actor.packing import FloatArray, PackedBatch, pack, plan_micro_batches, sequence_length, unpack_all
from searchr1.agent.trajectory import Trajectory
from searchr1.algorithms.sums import Sums, total
from searchr1.algorithms.value_loss import clipped_value_loss
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
        inputs = packed_model_inputs(batch)
        hidden_TH = self.model(**inputs)[0][0]
        values_P: Tensor = self.value_head(hidden_TH[batch.policy_positions_P - 1]).squeeze(-1).float()
        return values_P

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """As transformers' models have it."""
        self.model.gradient_checkpointing_enable(**kwargs)


class Critic:
    """One rank of the critic. Every method is a collective."""

    def __init__(self, config: Config, device: Device, total_steps: int | None) -> None:
        from transformers import AutoModel

        self._config = config
        self._device = device.torch_device()
        self._max_tokens = config.runner.max_tokens_per_mbs
        settings = config.critic
        self.path = settings.model_path or config.actor.model.path or config.rollout.model.model_path
        try:
            decoder = AutoModel.from_pretrained(
                self.path, dtype=torch.float32, attn_implementation=device.attention_implementation
            )
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"critic.model_path: cannot load a decoder from {self.path}: {error}") from error
        self.model = shard_model(
            ValueModel(decoder),
            device,
            precision=config.actor.model.precision,
            cpu_offload=config.actor.fsdp.cpu_offload,
            gradient_checkpointing=settings.gradient_checkpointing,
        )
        self.optimizer = build_optimizer(self.model, settings.optim)
        self.schedule = build_schedule(self.optimizer, settings.lr_sched, settings.optim.lr, total_steps)

    @classmethod
    def start(cls, config: Config, device: Device, total_steps: int | None) -> Critic:
        """Join the process group and load the critic: the policy's decoder unless `critic.model_path` says otherwise."""
        init_process_group(device, config.actor.megatron.distributed_timeout_minutes)
        torch.manual_seed(config.actor.seed)
        return cls(config, device, total_steps)

    @torch.no_grad()
    def values(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """V before each policy token, response-aligned ([N] each, 0 elsewhere)."""
        batches = self._pack(trajectories, None, None)
        return unpack_all(batches, [batch.scatter_policy(self.model(batch)) for batch in batches])

    def train_step(
        self,
        trajectories: Sequence[Trajectory],
        returns: Sequence[FloatArray],
        old_values: Sequence[FloatArray],
        minibatch_ids: Sequence[int],
    ) -> dict[str, float]:
        """One optimizer step per mini-batch; `returns` and `old_values` are response-aligned. Returns `critic/…` metrics."""
        started = time.perf_counter()
        sums, norms, skipped = Sums(), [], 0
        for number in range(self._config.algorithm.n_minibatches):
            members = [i for i, minibatch in enumerate(minibatch_ids) if minibatch == number]
            part = [trajectories[i] for i in members]
            # A packed batch carries per-token numbers; these two are the critic's.
            batches = self._pack(part, [returns[i] for i in members], [old_values[i] for i in members])
            sums = sums + all_reduce_sums(self._accumulate(batches, part))
            norm = clip_gradients(self.model, self._config.critic.optim.clip_grad)
            if math.isfinite(norm):
                self.optimizer.step()
                self.schedule.step()
                norms.append(norm)
            else:
                skipped += 1
            self.optimizer.zero_grad(set_to_none=True)
        totals = {name: float(value) for name, value in sums.totals.items()}
        tokens = max(1.0, totals["tokens"])
        variance = totals["returns_squared"] / tokens - (totals["returns"] / tokens) ** 2
        return {
            "critic/loss": totals["loss"] / tokens,
            "critic/value": totals["values"] / tokens,
            "critic/return": totals["returns"] / tokens,
            "critic/explained_variance": 1 - totals["error_squared"] / tokens / variance if variance > 1e-12 else 0.0,
            "critic/clip_fraction": totals["clipped"] / tokens,
            "critic/grad_norm": sum(norms) / len(norms) if norms else math.nan,
            "critic/lr": float(self.schedule.get_last_lr()[0]),
            "critic/skipped_updates": float(skipped),
            "time/critic": time.perf_counter() - started,
        }

    def _accumulate(self, batches: list[PackedBatch], trajectories: Sequence[Trajectory]) -> Sums:
        count = torch.tensor(sum(t.policy_length for t in trajectories), dtype=torch.int64, device=self._device)
        dist.all_reduce(count)
        sums = Sums()
        for batch in batches:
            values_P = self.model(batch)
            policy_P = batch.policy_positions_P
            assert batch.old_logprobs_T is not None
            returns_P, old_P = batch.advantages_T[policy_P], batch.old_logprobs_T[policy_P]
            loss_P, clipped_P = clipped_value_loss(values_P, old_P, returns_P, self._config.critic.cliprange_value)
            # FSDP averages gradients over ranks.
            (loss_P.sum() / count.clamp(min=1) * dist.get_world_size()).backward()
            sums = sums + Sums({
                "tokens": total(torch.ones_like(loss_P)),
                "loss": total(loss_P),
                "clipped": total(clipped_P),
                "values": total(values_P),
                "returns": total(returns_P),
                "returns_squared": total(returns_P.double().square()),
                "error_squared": total((values_P.detach() - returns_P).double().square()),
            })  # fmt: skip
        return sums

    def _pack(
        self,
        trajectories: Sequence[Trajectory],
        returns: Sequence[FloatArray] | None,
        old_values: Sequence[FloatArray] | None,
    ) -> list[PackedBatch]:
        count = len(plan_micro_batches([sequence_length(t) for t in trajectories], self._max_tokens))
        agreed = all_reduce_max(count, self._device)
        batches = pack(trajectories, self._max_tokens, advantages=returns, old_logprobs=old_values, at_least=agreed)
        return [batch.to(self._device) for batch in batches]

    def save(self, folder: Path) -> None:
        """Write everything that `load` needs."""
        with told_as_disk_trouble(folder):
            save_state(folder, self.model, self.optimizer, self.schedule, self.path)

    def load(self, folder: Path) -> None:
        """Go on from `save`, also with another number of ranks."""
        load_state(folder, self.model, self.optimizer, self.schedule)
