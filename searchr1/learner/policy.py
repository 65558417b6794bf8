"""The policy and the reference model: log-probabilities and training steps on either backend."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig

from searchr1.agent.trajectory import Sample, Trajectory
from searchr1.algorithms.aggregation import Denominators
from searchr1.algorithms.correction import correction_weights
from searchr1.algorithms.entropy import TokenLogprobs
from searchr1.algorithms.loss import LossConfig, LossInputs, loss_metrics, policy_gradient_loss
from searchr1.algorithms.mismatch import mismatch_metrics, mismatch_sums, ratio_too_large
from searchr1.algorithms.sums import Sums
from searchr1.config.schema import Config
from searchr1.device import Device
from searchr1.learner.backend import AnyPolicyBackend, PolicySchedule, ScoringBackend
from searchr1.learner.loss_settings import loss_config
from searchr1.learner.model import ENGINE_DTYPES
from searchr1.learner.packing import FloatArray, PackedBatch, unpack_all
from searchr1.learner.start import start_policy_backend
from searchr1.learner.stats import all_reduce_denominators, count_denominators, training_flops
from searchr1.learner.trained import TrainedModel, micro_batches
from searchr1.learner.trainer_config import TrainerConfig

logger = logging.getLogger(__name__)


class ScoringModel:
    """A model that gives log-probabilities: the reference model, and what the policy builds on.

    Every method is a collective: all ranks call it together.
    """

    backend: ScoringBackend

    def __init__(self, backend: ScoringBackend, config: Config) -> None:
        self.backend = backend
        self._max_tokens = config.runner.max_tokens_per_mbs
        sampling = config.algorithm.sampling_params
        self._temperature = sampling.temperature if sampling.do_sample else 1.0

    @classmethod
    def start_reference(cls, config: Config, device: Device) -> ScoringModel:
        """Load the frozen reference model: the weights that training starts from.

        It runs on FSDP2 whatever trains the policy: without gradients and optimizer there is nothing else to share.
        """
        from searchr1.learner.fsdp import FsdpModel

        trainer = TrainerConfig.for_actor(config)
        return cls(FsdpModel.start_frozen(config.inference.model_path or trainer.model_path, trainer, device), config)

    def logprobs(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """Return log-probabilities of policy tokens, response-aligned ([N] each, 0 elsewhere), in the order given."""
        return self._score(trajectories, self._temperature)

    def probe_logprobs(self, sequences: list[list[int]]) -> list[list[float]]:
        """Return log-probabilities at temperature 1, one per token, 0 for the first: as the rollout engine's probe does."""
        logprobs = self._score([_as_trajectory(ids) for ids in sequences], 1.0)
        return [[0.0, *values.tolist()] for values in logprobs]

    def _score(self, trajectories: Sequence[Trajectory], temperature: float) -> list[FloatArray]:
        batches = self._pack(trajectories)
        logprobs = self.backend.logprobs(batches, temperature)
        scattered = [batch.scatter_policy(values_P) for batch, values_P in zip(batches, logprobs, strict=True)]
        return unpack_all(batches, scattered)

    def _pack(
        self,
        trajectories: Sequence[Trajectory],
        advantages: Sequence[float | FloatArray] | None = None,
        old_logprobs: Sequence[FloatArray] | None = None,
    ) -> list[PackedBatch]:
        """Return micro-batches, as many on every rank."""
        return micro_batches(self.backend, self._max_tokens, trajectories, advantages=advantages, old_logprobs=old_logprobs)


class Policy(ScoringModel, TrainedModel):
    """The policy with its optimizer."""

    backend: AnyPolicyBackend

    def __init__(self, backend: AnyPolicyBackend, config: Config) -> None:
        ScoringModel.__init__(self, backend, config)
        self._trainer = TrainerConfig.for_actor(config)
        TrainedModel.__init__(self, backend, self._trainer)
        self._algorithm = config.algorithm
        self._loss = loss_config(config.algorithm)
        self._with_entropy = config.algorithm.calculate_entropy or config.algorithm.entropy_bonus != 0
        self._longest = config.algorithm.sampling_params.max_new_tokens or config.runner.seq_length
        self._rollout_dtype = ENGINE_DTYPES[config.rollout.model.precision]
        self._model_config: Any = None
        if config.actor.calculate_flops:
            self._model_config = AutoConfig.from_pretrained(self._trainer.model_path, trust_remote_code=False)

    @classmethod
    def start(cls, config: Config, device: Device, total_steps: int | None = None) -> Policy:
        """Join the process group and load the model on the backend that the configuration names.

        Args:
            config: of the run.
            device: where to compute.
            total_steps: optimizer steps of the whole run, for decaying schedules.

        Raises:
            UserError: there is no such model, or its backend cannot do it.
        """
        return cls(start_policy_backend(TrainerConfig.for_actor(config, total_steps), device), config)

    @property
    def rollout_dtype(self) -> torch.dtype:
        """Precision of the rollout engine's weights."""
        return self._rollout_dtype

    def named_weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield weights as the rollout engine holds them: in its precision unless `dtype` says otherwise.

        On ranks but the first, a tensor may be an empty shell; every rank must go through all of them.
        """
        return self.backend.named_weights(dtype or self._rollout_dtype)

    def named_adapters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield LoRA's matrices under peft's names, in the engine's precision; a collective."""
        return self.backend.named_adapters(self._rollout_dtype)

    def train_step(
        self, trajectories: Sequence[Trajectory], advantages: Sequence[float | FloatArray], minibatch_ids: Sequence[int]
    ) -> dict[str, float]:
        """Make one optimizer step per mini-batch on this rank's share of a rollout step.

        Old log-probabilities are the engine's (`recompute_logprobs: False`) or this model's before the first update.
        For the first mini-batch the latter are the training forward's own, so no extra pass is run for it.

        Args:
            trajectories: this rank's share; shares may differ in size.
            advantages: one per trajectory, or [N] one per response token.
            minibatch_ids: which mini-batch each belongs to; the same numbering on all ranks.

        Returns:
            Metrics over all ranks: `actor/…` and `mismatch/…`.
        """
        started = time.perf_counter()
        self.reload("weight", "grad", "optimizer")
        algorithm = self._algorithm
        members = [[i for i, m in enumerate(minibatch_ids) if m == number] for number in range(algorithm.n_minibatches)]
        # The first mini-batch's are the training forward's own, unless its weights must be normalised beforehand.
        first = 0 if self._normalizes_weights else 1
        later = [i for indices in members[first:] for i in indices]
        old: dict[int, FloatArray] = {}
        if algorithm.recompute_logprobs and algorithm.n_minibatches > first:
            recomputed = self.logprobs([trajectories[i] for i in later])
            old = dict(zip(later, recomputed, strict=True))
        logprob_seconds = time.perf_counter() - started

        loss_sums, gap_sums = Sums(), Sums()
        norms, skipped, stopped = [], 0, 0
        for number, indices in enumerate(members):
            part = [trajectories[i] for i in indices]
            if algorithm.recompute_logprobs:
                old_logprobs = [old[i] for i in indices] if number >= first else None
            else:
                old_logprobs = [trajectory.rollout_logprobs for trajectory in part]
            batches = self._pack(part, [advantages[i] for i in indices], old_logprobs)
            sums, gaps = self._accumulate(batches, part, self._weight_scale(part, old_logprobs))
            loss_sums = loss_sums + sums
            # The trained model's log-probabilities with the weights that sampled: recomputed ones are, the training
            # forward's own are only until the first update.
            if algorithm.recompute_logprobs or number == 0:
                gap_sums = gap_sums + gaps
            metrics = loss_metrics(sums)
            norm = self.backend.clip_gradients(self._trainer.optim.clip_grad)
            if not math.isfinite(norm) or not math.isfinite(metrics["loss"]):
                # A non-finite gradient would stay in Adam's moments for ever; leaving one update out costs little.
                skipped += 1
                logger.warning("an update was skipped: gradient norm %s, loss %s", norm, metrics["loss"])
            elif ratio_too_large(metrics["ratio"], algorithm.early_stop_imp_ratio):
                stopped += 1
                limit = algorithm.early_stop_imp_ratio
                logger.warning("an update was left out: its mean ratio %s is above %s", metrics["ratio"], limit)
            else:
                self.backend.step()
                norms.append(norm)
            self.backend.zero_grad()
        result = {f"actor/{name}": value for name, value in loss_metrics(loss_sums).items()}
        for name in ("loss", "policy_loss", "kl_loss"):
            if f"actor/{name}" in result:
                result[f"actor/{name}"] /= algorithm.n_minibatches
        result |= {f"mismatch/{name}": value for name, value in mismatch_metrics(gap_sums).items()}
        self.offload("grad", "optimizer")
        seconds = time.perf_counter() - started
        if "flops" in loss_sums.totals:
            rate = float(loss_sums.totals["flops"]) / (seconds - logprob_seconds) / dist.get_world_size()
            result["actor/tflops_per_rank"] = rate / 1e12
        return result | {
            "actor/grad_norm": sum(norms) / len(norms) if norms else math.nan,
            "actor/lr": self.backend.learning_rate,
            "actor/updates": float(len(norms)),
            "actor/skipped_updates": float(skipped),
            "actor/early_stopped": float(stopped),
            "time/logprob": logprob_seconds,
            "time/train": seconds - logprob_seconds,
        }

    @property
    def _normalizes_weights(self) -> bool:
        correction = self._algorithm.mismatch_correction
        return correction.level is not None and correction.normalize and not self._loss.ratio_is_correction

    def _weight_scale(self, trajectories: Sequence[Trajectory], old_logprobs: Sequence[FloatArray] | None) -> float:
        """Return 1 / mean of a mini-batch's correction weights over all ranks' policy tokens; 1 without normalisation."""
        if not self._normalizes_weights or old_logprobs is None:
            return 1.0
        assert self._loss.correction is not None
        masks = [trajectory.loss_mask for trajectory in trajectories]
        gaps = [old[mask] - t.rollout_logprobs[mask] for old, t, mask in zip(old_logprobs, trajectories, masks, strict=True)]
        segments = np.repeat(np.arange(len(gaps)), [len(gap) for gap in gaps])
        d_P = torch.from_numpy(np.concatenate([*gaps, np.zeros(0, dtype=np.float32)])).double()
        weights_P = correction_weights(d_P, torch.from_numpy(segments), self._loss.correction).weights_P
        sums = torch.stack([weights_P.sum(), torch.tensor(float(len(d_P)), dtype=torch.float64)]).to(self.backend.device)
        dist.all_reduce(sums, group=self.backend.data_group)
        return float(sums[1] / sums[0]) if sums[0] > 0 else 1.0

    def _accumulate(
        self, batches: list[PackedBatch], trajectories: Sequence[Trajectory], weight_scale: float = 1.0
    ) -> tuple[Sums, Sums]:
        """Add up the gradients of one mini-batch. Return the loss's and the mismatch's sums over all ranks."""
        local = count_denominators(trajectories, self._longest)
        denominators = all_reduce_denominators(local, self.backend.device, self.backend.data_group)
        mini_batch = _MiniBatch(self._loss, denominators, weight_scale, self._algorithm.kl_beta != 0, self._model_config)
        self._run(batches, mini_batch)
        return self.backend.share(mini_batch.loss_sums), self.backend.share(mini_batch.gap_sums)

    def _run(self, batches: list[PackedBatch], mini_batch: _MiniBatch) -> None:
        """Run forward, loss and backward of every micro-batch."""
        if isinstance(self.backend, PolicySchedule):  # a pipeline decides itself which stage runs what when
            self.backend.run_schedule(batches, self._temperature, self._with_entropy, mini_batch.loss)
            return
        for batch in batches:
            values = self.backend.forward(batch, self._temperature, self._with_entropy)
            loss = mini_batch.loss(batch, values)
            self.backend.backward(loss)


@dataclass(slots=True)
class _MiniBatch:
    """The policy loss of a mini-batch's micro-batches, and its sums so far."""

    config: LossConfig
    denominators: Denominators
    """Of the whole mini-batch, over all ranks."""
    weight_scale: float
    """1 / mean of the correction weights, or 1."""
    with_reference: bool
    model_config: Any
    """transformers' configuration of the model, to count floating-point operations; None does not count them."""
    loss_sums: Sums = field(default_factory=Sums)
    gap_sums: Sums = field(default_factory=Sums)

    def loss(self, batch: PackedBatch, values: TokenLogprobs) -> Tensor:
        """Return one micro-batch's share of the mini-batch's mean loss."""
        logprobs_T = batch.scatter_policy(values.logprobs_M)
        # Without given ones the weights are still those of the rollout: the forward's own are the old ones.
        old_T = batch.old_logprobs_T if batch.old_logprobs_T is not None else logprobs_T.detach()
        output = policy_gradient_loss(
            LossInputs(
                logprobs_T=logprobs_T,
                old_logprobs_T=old_T,
                advantages_T=batch.advantages_T,
                loss_mask_T=batch.loss_mask_T,
                segment_ids_T=batch.segment_ids_T,
                denominators=self.denominators,
                rollout_logprobs_T=batch.rollout_logprobs_T,
                weight_scale=self.weight_scale,
                policy_positions_P=batch.policy_positions_P,
                sequences=len(batch.lengths),
                ref_logprobs_T=self._reference(batch),
                entropy_T=batch.scatter_policy(values.entropy_M) if values.entropy_M is not None else None,
            ),
            self.config,
        )
        self.loss_sums = self.loss_sums + output.sums
        sampled_T = logprobs_T if self.config.ratio_is_correction else old_T
        self.gap_sums = self.gap_sums + mismatch_sums(sampled_T, batch.rollout_logprobs_T, batch.policy_positions_P)
        if self.model_config is not None:
            flops = training_flops(self.model_config, batch.lengths, len(values.logprobs_M))
            counted = torch.full((), flops, dtype=torch.float64, device=logprobs_T.device)
            self.loss_sums = self.loss_sums + Sums({"flops": counted})
        return output.loss

    def _reference(self, batch: PackedBatch) -> Tensor | None:
        if not self.with_reference:
            return None
        # A filler batch has no trajectories and so no reference; zeros are never read there.
        return batch.ref_logprobs_T if batch.ref_logprobs_T is not None else torch.zeros_like(batch.advantages_T)


def _as_trajectory(ids: list[int]) -> Trajectory:
    """Return the trajectory of a probe: everything after the first token counts as sampled."""
    response = np.array(ids[1:], dtype=np.int32)
    return Trajectory(
        sample=Sample("probe/0", 0, ids[:1], "", []),
        rollout_id=0,
        response_ids=response,
        loss_mask=np.ones(len(response), dtype=np.bool_),
        rollout_logprobs=np.zeros(len(response), dtype=np.float32),
        turns=[],
        stop="eos",
    )
