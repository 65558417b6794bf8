"""The policy on FSDP2: log-probabilities, training steps, weights out, checkpoints."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from searchr1.actor.batch_stats import all_reduce_denominators, all_reduce_max, all_reduce_sums, count_denominators
from searchr1.actor.checkpoint import load_state, save_state
from searchr1.actor.model import COMPUTE_DTYPES, init_process_group, load_model, policy_logprobs
from searchr1.actor.optimizer import build_optimizer, build_schedule, clip_gradients
from searchr1.actor.packing import PackedBatch, pack, plan_micro_batches, sequence_length, unpack_all
from searchr1.agent.trajectory import Sample, Trajectory
from searchr1.algorithms.loss import LossConfig, LossInputs, loss_metrics, policy_gradient_loss
from searchr1.algorithms.mismatch import mismatch_metrics, mismatch_sums, ratio_too_large
from searchr1.algorithms.policy_losses import ClipSettings
from searchr1.algorithms.sums import Sums
from searchr1.config.schema import AlgorithmConfig, Config
from searchr1.device import Device

logger = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float32]


class FsdpModel:
    """A sharded model that gives log-probabilities: the reference, and what the actor builds on.

    Every method is a collective: all ranks call it together.
    """

    def __init__(self, model: nn.Module, device: Device, max_tokens: int, temperature: float) -> None:
        self.model = model
        self._device = device.torch_device()
        self._max_tokens = max_tokens
        self._temperature = temperature

    @torch.no_grad()
    def logprobs(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """Log-probabilities of policy tokens, response-aligned ([N] each, 0 elsewhere), in the order given."""
        batches = self._pack(trajectories)
        found = []
        for batch in batches:
            values_P = policy_logprobs(self.model, batch, self._temperature).logprobs_M
            found.append(batch.scatter_policy(values_P))
        return unpack_all(batches, found)

    @torch.no_grad()
    def probe_logprobs(self, sequences: list[list[int]]) -> list[list[float]]:
        """At temperature 1, one value per token, 0 for the first: what the rollout engine's probe gives."""
        trajectories = [_as_trajectory(ids) for ids in sequences]
        batches = self._pack(trajectories)
        found = [batch.scatter_policy(policy_logprobs(self.model, batch, 1.0).logprobs_M) for batch in batches]
        return [[0.0, *values.tolist()] for values in unpack_all(batches, found)]

    def named_weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Full tensors under their Hugging Face names, a tied output layer left out."""
        for name, parameter in self.model.named_parameters():
            full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            yield name, full.detach().to(dtype) if dtype is not None else full.detach()

    def _pack(
        self,
        trajectories: Sequence[Trajectory],
        advantages: Sequence[float] | None = None,
        old_logprobs: Sequence[FloatArray] | None = None,
    ) -> list[PackedBatch]:
        """Micro-batches, as many on every rank."""
        count = len(plan_micro_batches([sequence_length(t) for t in trajectories], self._max_tokens))
        agreed = all_reduce_max(count, self._device)
        batches = pack(trajectories, self._max_tokens, advantages=advantages, old_logprobs=old_logprobs, at_least=agreed)
        return [batch.to(self._device) for batch in batches]


class FsdpReference(FsdpModel):
    """The frozen reference model."""

    @classmethod
    def start(cls, config: Config, device: Device) -> FsdpReference:
        """Join the process group and load the weights that training starts from."""
        init_process_group(device)
        path = config.inference.model_path or config.actor.model.path or config.rollout.model.model_path
        model = load_model(path, device, precision=config.actor.model.precision, trainable=False)
        return cls(model, device, config.runner.max_tokens_per_mbs, _temperature(config.algorithm))


class FsdpActor(FsdpModel):
    """The policy with its optimizer."""

    def __init__(self, model: nn.Module, device: Device, config: Config, total_steps: int | None = None) -> None:
        super().__init__(model, device, config.runner.max_tokens_per_mbs, _temperature(config.algorithm))
        self._config = config
        self._loss = loss_config(config.algorithm)
        self.optimizer = build_optimizer(model, config.actor.optim)
        self.schedule = build_schedule(self.optimizer, config.actor.lr_sched, config.actor.optim.lr, total_steps)

    @classmethod
    def start(cls, config: Config, device: Device, total_steps: int | None = None) -> FsdpActor:
        """Join the process group and load the model.

        Args:
            config: of the run.
            device: where to compute.
            total_steps: optimizer steps of the whole run, for decaying schedules.
        """
        init_process_group(device)
        torch.manual_seed(config.actor.seed)
        model = load_model(
            config.actor.model.path or config.rollout.model.model_path,
            device,
            precision=config.actor.model.precision,
            reshard_after_forward=config.actor.fsdp.reshard_after_forward,
            cpu_offload=config.actor.fsdp.cpu_offload,
            gradient_checkpointing=config.actor.model.gradient_checkpointing,
        )
        return cls(model, device, config, total_steps)

    def named_weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """As the rollout engine holds them: in its precision unless `dtype` says otherwise."""
        yield from super().named_weights(dtype or COMPUTE_DTYPES[self._config.rollout.model.precision])

    @property
    def weight_bytes(self) -> int:
        """Size of all weights as published."""
        size = COMPUTE_DTYPES[self._config.rollout.model.precision].itemsize
        return sum(parameter.numel() for parameter in self.model.parameters()) * size

    def train_step(
        self, trajectories: Sequence[Trajectory], advantages: Sequence[float], minibatch_ids: Sequence[int]
    ) -> dict[str, float]:
        """One optimizer step per mini-batch on this rank's share of a rollout step.

        Old log-probabilities are the engine's (`recompute_logprobs: False`) or this model's before the first update.
        For the first mini-batch the latter are the training forward's own, so no extra pass is run for it.

        Args:
            trajectories: this rank's share; shares may differ in size.
            advantages: one per trajectory.
            minibatch_ids: which mini-batch each belongs to; the same numbering on all ranks.

        Returns:
            Metrics over all ranks: `actor/…` and `mismatch/…`.
        """
        started = time.perf_counter()
        algorithm = self._config.algorithm
        members = [[i for i, m in enumerate(minibatch_ids) if m == number] for number in range(algorithm.n_minibatches)]
        later = [i for indices in members[1:] for i in indices]
        old: dict[int, FloatArray] = {}
        if algorithm.recompute_logprobs and algorithm.n_minibatches > 1:
            recomputed = self.logprobs([trajectories[i] for i in later])
            old = dict(zip(later, recomputed, strict=True))
        logprob_seconds = time.perf_counter() - started

        loss_sums: Sums | None = None
        gap_sums: Sums | None = None
        norms, skipped, stopped = [], 0, 0
        for number, indices in enumerate(members):
            part = [trajectories[i] for i in indices]
            if algorithm.recompute_logprobs:
                old_logprobs = [old[i] for i in indices] if number else None
            else:
                old_logprobs = [trajectory.rollout_logprobs for trajectory in part]
            batches = self._pack(part, [advantages[i] for i in indices], old_logprobs)
            sums, gaps = self._accumulate(batches, part, fresh=number == 0)
            loss_sums = sums if loss_sums is None else loss_sums + sums
            if number == 0:
                gap_sums = gaps
            metrics = loss_metrics(sums)
            norm = clip_gradients(self.model, self._config.actor.optim.clip_grad)
            if ratio_too_large(metrics["ratio"], algorithm.early_stop_imp_ratio):
                stopped += 1
            elif not math.isfinite(norm) or not math.isfinite(metrics["loss"]):
                # A non-finite gradient would stay in Adam's moments for ever; leaving one update out costs little.
                skipped += 1
                logger.warning("an update was skipped: gradient norm %s, loss %s", norm, metrics["loss"])
            else:
                self.optimizer.step()
                self.schedule.step()
                norms.append(norm)
            self.optimizer.zero_grad(set_to_none=True)
        assert loss_sums is not None
        assert gap_sums is not None
        result = {f"actor/{name}": value for name, value in loss_metrics(loss_sums).items()}
        for name in ("loss", "policy_loss", "kl_loss"):
            if f"actor/{name}" in result:
                result[f"actor/{name}"] /= algorithm.n_minibatches
        result |= {f"mismatch/{name}": value for name, value in mismatch_metrics(gap_sums).items()}
        seconds = time.perf_counter() - started
        return result | {
            "actor/grad_norm": sum(norms) / len(norms) if norms else math.nan,
            "actor/lr": float(self.schedule.get_last_lr()[0]),
            "actor/updates": float(len(norms)),
            "actor/skipped_updates": float(skipped),
            "actor/early_stopped": float(stopped),
            "time/logprob": logprob_seconds,
            "time/train": seconds - logprob_seconds,
        }

    def _accumulate(self, batches: list[PackedBatch], trajectories: Sequence[Trajectory], fresh: bool) -> tuple[Sums, Sums]:
        """Gradients of one mini-batch. Returns the loss's and the mismatch's sums over all ranks.

        `fresh`: the weights are still those that the rollout used, so the forward's own log-probabilities are the old
        ones (if none are given) and what the engine's are compared with.
        """
        algorithm = self._config.algorithm
        longest = algorithm.sampling_params.max_new_tokens or self._config.runner.seq_length
        denominators = all_reduce_denominators(count_denominators(trajectories, longest), self._device)
        with_entropy = algorithm.calculate_entropy or algorithm.entropy_bonus != 0
        loss_sums, gap_sums = Sums(), Sums()
        for batch in batches:
            with torch.set_grad_enabled(True):
                values = policy_logprobs(self.model, batch, self._temperature, with_entropy)
                logprobs_T = batch.scatter_policy(values.logprobs_M)
                old_T = batch.old_logprobs_T if batch.old_logprobs_T is not None else logprobs_T.detach()
                output = policy_gradient_loss(
                    LossInputs(
                        logprobs_T=logprobs_T,
                        old_logprobs_T=old_T,
                        advantages_T=batch.advantages_T,
                        loss_mask_T=batch.loss_mask_T,
                        segment_ids_T=batch.segment_ids_T,
                        denominators=denominators,
                        ref_logprobs_T=self._reference(batch),
                        entropy_T=batch.scatter_policy(values.entropy_M) if values.entropy_M is not None else None,
                    ),
                    self._loss,
                )
                # FSDP averages gradients over ranks; the loss is already a share of a global mean.
                (output.loss * dist.get_world_size()).backward()
            loss_sums = loss_sums + output.sums
            gap_sums = gap_sums + mismatch_sums(logprobs_T, batch.rollout_logprobs_T, batch.loss_mask_T)
        return all_reduce_sums(loss_sums), all_reduce_sums(gap_sums)

    def _reference(self, batch: PackedBatch) -> Tensor | None:
        if self._config.algorithm.kl_beta == 0:
            return None
        # A filler batch has no trajectories and so no reference; zeros are never read there.
        return batch.ref_logprobs_T if batch.ref_logprobs_T is not None else torch.zeros_like(batch.advantages_T)

    def save(self, folder: Path) -> None:
        """Write model, optimizer, schedule and random state into `folder` (see checkpoint.py)."""
        model_path = self._config.actor.model.path or self._config.rollout.model.model_path
        save_state(folder, self.model, self.optimizer, self.schedule, model_path)

    def load(self, folder: Path) -> None:
        """Go on from `save`, also with another number of ranks."""
        load_state(folder, self.model, self.optimizer, self.schedule)


def loss_config(algorithm: AlgorithmConfig) -> LossConfig:
    """The loss that the `algorithm` section asks for."""
    low = algorithm.ratio_clip_eps if algorithm.clip_ratio_low is None else algorithm.clip_ratio_low
    high = algorithm.ratio_clip_eps if algorithm.clip_ratio_high is None else algorithm.clip_ratio_high
    return LossConfig(
        clip=ClipSettings(low, high, algorithm.clip_ratio_c, algorithm.sapo_tau_positive, algorithm.sapo_tau_negative),
        loss_type=algorithm.loss_type,
        aggregation=algorithm.loss_agg_func,  # type: ignore[arg-type]  # checked by config/check.py
        kl_beta=algorithm.kl_beta,
        kl_penalty_type=algorithm.kl_penalty_type,
        entropy_bonus=algorithm.entropy_bonus,
    )


def _temperature(algorithm: AlgorithmConfig) -> float:
    return algorithm.sampling_params.temperature if algorithm.sampling_params.do_sample else 1.0


def _as_trajectory(ids: list[int]) -> Trajectory:
    """A probe: everything after the first token counts as sampled."""
    response = np.array(ids[1:], dtype=np.int32)
    return Trajectory(
        sample=Sample("probe/0", 0, ids[:1], "", []),
        replica=0,
        response_ids=response,
        loss_mask=np.ones(len(response), dtype=np.bool_),
        rollout_logprobs=np.zeros(len(response), dtype=np.float32),
        turns=[],
        stop="eos",
    )
