"""PPO's critic: values of states and training steps on either backend."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from searchr1.agent.trajectory import Trajectory
from searchr1.algorithms.sums import Sums, on_host, total
from searchr1.algorithms.value_loss import clipped_value_loss
from searchr1.config.critic import critic_run
from searchr1.config.schema import Config
from searchr1.device import Device
from searchr1.learner.backend import ValueBackend
from searchr1.learner.packing import FloatArray, PackedBatch, unpack_all
from searchr1.learner.stats import all_reduce_denominators, count_denominators
from searchr1.learner.trained import TrainedModel, micro_batches

logger = logging.getLogger(__name__)


class Critic(TrainedModel):
    """One rank of the critic. Every method is a collective."""

    def __init__(self, backend: ValueBackend, config: Config) -> None:
        super().__init__(backend, config)
        self.backend = backend
        self._config = config
        self._max_tokens = config.runner.max_tokens_per_mbs

    @classmethod
    def start(cls, config: Config, device: Device, total_steps: int | None) -> Critic:
        """Join the process group and load the critic: the policy's decoder unless `critic.model_path` says otherwise.

        Raises:
            UserError: there is no such model, or its backend cannot do it.
        """
        run = critic_run(config)
        if run.actor.training_backend == "megatron":
            from searchr1.learner.megatron.backend import MegatronValueBackend

            return cls(MegatronValueBackend.start(run, device, total_steps), config)
        from searchr1.learner.fsdp import FsdpValueBackend

        return cls(FsdpValueBackend.start(run, device, total_steps), config)

    def values(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """V before each policy token, response-aligned ([N] each, 0 elsewhere)."""
        self.bring_back("weight")
        batches = micro_batches(self.backend, self._max_tokens, trajectories)
        found = self.backend.values(batches)
        return unpack_all(batches, [batch.scatter_policy(values_P) for batch, values_P in zip(batches, found, strict=True)])

    def train_step(
        self,
        trajectories: Sequence[Trajectory],
        returns: Sequence[FloatArray],
        old_values: Sequence[FloatArray],
        minibatch_ids: Sequence[int],
    ) -> dict[str, float]:
        """One optimizer step per mini-batch on this replica's share of a rollout step.

        Args:
            trajectories: the share.
            returns: what the values should have been, response-aligned.
            old_values: what `values` gave.
            minibatch_ids: which mini-batch each belongs to; the same numbering on all ranks.

        Returns:
            `critic/…` metrics over all ranks.
        """
        started = time.perf_counter()
        self.bring_back("weight", "grad", "optimizer")
        sums, norms, skipped = Sums(), [], 0
        for number in range(self._config.algorithm.n_minibatches):
            members = [i for i, minibatch in enumerate(minibatch_ids) if minibatch == number]
            part = [trajectories[i] for i in members]
            sums = sums + self._accumulate(part, [returns[i] for i in members], [old_values[i] for i in members])
            norm = self.backend.clip_gradients(self._config.critic.optim.clip_grad)
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
        """Gradients of one mini-batch. Returns sums over all ranks."""
        local = count_denominators(trajectories)
        tokens = max(1, all_reduce_denominators(local, self.backend.device, self.backend.data_group).tokens)
        sums = Sums()

        def loss(batch: PackedBatch, values_P: Tensor) -> Tensor:
            nonlocal sums
            policy_P = batch.policy_positions_P
            assert batch.old_logprobs_T is not None
            returns_P, old_P = batch.advantages_T[policy_P], batch.old_logprobs_T[policy_P]
            loss_P, clipped_P = clipped_value_loss(values_P, old_P, returns_P, self._config.critic.cliprange_value)
            sums = sums + Sums({
                "tokens": total(torch.ones_like(loss_P)),
                "loss": total(loss_P),
                "clipped": total(clipped_P),
                "values": total(values_P),
                "returns": total(returns_P),
                "returns_squared": total(returns_P.double().square()),
                "error_squared": total((values_P.detach() - returns_P).double().square()),
            })  # fmt: skip
            return loss_P.sum() / tokens

        # A packed batch carries two numbers a token; these are the critic's.
        batches = micro_batches(self.backend, self._max_tokens, trajectories, returns, old_values)
        self.backend.forward_backward(batches, loss)
        return self.backend.share(sums)
