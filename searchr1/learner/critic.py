"""PPO's critic: values of states and training steps on either backend."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from searchr1.agent.trajectory import Trajectory
from searchr1.algorithms.sums import Sums, on_host, total
from searchr1.algorithms.value_loss import clipped_value_loss
from searchr1.config.schema import Config
from searchr1.device import Device
from searchr1.learner.backend import AnyValueBackend, ValueSchedule
from searchr1.learner.packing import FloatArray, PackedBatch, unpack_all
from searchr1.learner.start import start_value_backend
from searchr1.learner.stats import all_reduce_denominators, count_denominators
from searchr1.learner.trained import TrainedModel, micro_batches
from searchr1.learner.trainer_config import TrainerConfig

logger = logging.getLogger(__name__)


class Critic(TrainedModel):
    """One rank of the critic. Every method is a collective."""

    backend: AnyValueBackend

    def __init__(self, backend: AnyValueBackend, config: Config) -> None:
        self._trainer = TrainerConfig.for_critic(config)
        super().__init__(backend, self._trainer)
        self._cliprange = config.critic.cliprange_value
        self._n_minibatches = config.algorithm.n_minibatches

    @classmethod
    def start(cls, config: Config, device: Device, total_steps: int | None) -> Critic:
        """Join the process group and load the critic: the policy's decoder unless `critic.model_path` says otherwise.

        Args:
            config: of the run.
            device: where to compute.
            total_steps: optimizer steps of the whole run, for decaying schedules.

        Raises:
            UserError: there is no such model, or its backend cannot do it.
        """
        return cls(start_value_backend(TrainerConfig.for_critic(config, total_steps), device), config)

    def values(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """Return V before each policy token, response-aligned ([N] each, 0 elsewhere)."""
        self.reload("weight")
        batches = micro_batches(self.backend, self._trainer.max_tokens, trajectories)
        values = self.backend.values(batches)
        return unpack_all(batches, [batch.scatter_policy(values_P) for batch, values_P in zip(batches, values, strict=True)])

    def train_step(
        self,
        trajectories: Sequence[Trajectory],
        returns: Sequence[FloatArray],
        old_values: Sequence[FloatArray],
        minibatch_ids: Sequence[int],
    ) -> dict[str, float]:
        """Make one optimizer step per mini-batch on this data-parallel rank's share of a rollout step.

        Args:
            trajectories: the share.
            returns: what the values should have been, response-aligned.
            old_values: what `values` gave.
            minibatch_ids: which mini-batch each belongs to; the same numbering on all ranks.

        Returns:
            `critic/…` metrics over all ranks.
        """
        started = time.perf_counter()
        self.reload("weight", "grad", "optimizer")
        sums, norms, skipped = Sums(), [], 0
        for number in range(self._n_minibatches):
            members = [i for i, minibatch in enumerate(minibatch_ids) if minibatch == number]
            part = [trajectories[i] for i in members]
            sums = sums + self._accumulate(part, [returns[i] for i in members], [old_values[i] for i in members])
            norm = self.backend.clip_gradients(self._trainer.optim.clip_grad)
            if math.isfinite(norm):
                self.backend.step()
                norms.append(norm)
            else:
                skipped += 1
                logger.warning("an update of the critic was skipped: gradient norm %s", norm)
            self.backend.zero_grad()
        self.offload("weight", "grad", "optimizer")
        totals = on_host(sums.totals)
        tokens = max(1.0, totals["tokens"])
        variance = totals["returns_squared"] / tokens - (totals["returns"] / tokens) ** 2
        return {
            "critic/loss": totals["loss"] / tokens,
            "critic/value": totals["values"] / tokens,
            "critic/return": totals["returns"] / tokens,
            "critic/explained_variance": 1 - totals["error_squared"] / tokens / variance if variance > 1e-12 else 0.0,
            "critic/clip_fraction": totals["clipped"] / tokens,
            "critic/grad_norm": sum(norms) / len(norms) if norms else math.nan,
            "critic/lr": self.backend.learning_rate,
            "critic/skipped_updates": float(skipped),
            "time/critic": time.perf_counter() - started,
        }

    def _accumulate(
        self, trajectories: Sequence[Trajectory], returns: Sequence[FloatArray], old_values: Sequence[FloatArray]
    ) -> Sums:
        """Add up the gradients of one mini-batch. Return its sums over all ranks."""
        local = count_denominators(trajectories)
        tokens = max(1, all_reduce_denominators(local, self.backend.device, self.backend.data_group).tokens)
        mini_batch = _MiniBatch(self._cliprange, tokens)
        batches = micro_batches(self.backend, self._trainer.max_tokens, trajectories, returns=returns, old_values=old_values)
        if isinstance(self.backend, ValueSchedule):  # a pipeline decides itself which stage runs what when
            self.backend.run_schedule(batches, mini_batch.loss)
        else:
            for batch in batches:
                values_P = self.backend.forward(batch)
                loss = mini_batch.loss(batch, values_P)
                self.backend.backward(loss)
        return self.backend.share(mini_batch.sums)


@dataclass(slots=True)
class _MiniBatch:
    """The value loss of a mini-batch's micro-batches, and its sums so far."""

    cliprange: float
    tokens: int
    """Policy tokens of the mini-batch, over all ranks."""
    sums: Sums = field(default_factory=Sums)

    def loss(self, batch: PackedBatch, values_P: Tensor) -> Tensor:
        """Return one micro-batch's share of the mini-batch's mean loss."""
        assert batch.returns_T is not None
        assert batch.old_values_T is not None
        returns_P, old_P = batch.returns_T[batch.policy_positions_P], batch.old_values_T[batch.policy_positions_P]
        loss_P, clipped_P = clipped_value_loss(values_P, old_P, returns_P, self.cliprange)
        self.sums = self.sums + Sums({
            "tokens": total(torch.ones_like(loss_P)),
            "loss": total(loss_P),
            "clipped": total(clipped_P),
            "values": total(values_P),
            "returns": total(returns_P),
            "returns_squared": total(returns_P.double().square()),
            "error_squared": total((values_P.detach() - returns_P).double().square()),
        })  # fmt: skip
        return loss_P.sum() / self.tokens
