"""What the policy and the critic have in common: micro-batches, replicas, checkpoints, tensors that leave the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from searchr1.agent.trajectory import Trajectory
from searchr1.config.schema import Config
from searchr1.learner.backend import ModelPart, Resident, T, TrainingBackend
from searchr1.learner.checkpoint import told_as_disk_trouble, verify_by_first_rank
from searchr1.learner.offload import Offload
from searchr1.learner.packing import FloatArray, PackedBatch, pack, plan_micro_batches, sequence_length
from searchr1.learner.stats import all_reduce_max


def micro_batches(
    part: ModelPart,
    max_tokens: int,
    trajectories: Sequence[Trajectory],
    advantages: Sequence[float | FloatArray] | None = None,
    old_logprobs: Sequence[FloatArray] | None = None,
) -> list[PackedBatch]:
    """Packed, on the model's device, as many on every rank; a collective."""
    count = len(plan_micro_batches([sequence_length(t) for t in trajectories], max_tokens))
    agreed = all_reduce_max(count, part.device, part.data_group)
    batches = pack(trajectories, max_tokens, advantages=advantages, old_logprobs=old_logprobs, at_least=agreed)
    return [batch.to(part.device) for batch in batches]


class TrainedModel:
    """One rank of a model in training. Every method is a collective."""

    def __init__(self, backend: TrainingBackend, config: Config) -> None:
        self._training = backend
        actor = config.actor
        asked: dict[Resident, bool] = {
            "optimizer": actor.offload_optimizer,
            "grad": actor.offload_grad,
            "weight": actor.offload_weight,
        }
        self.offloads: dict[Resident, Offload] = {
            kind: Offload(partial(backend.resident, kind), keep=kind != "grad")
            for kind, is_asked in asked.items()
            if is_asked and backend.device.type == "cuda"  # a CPU has only host memory
        }

    def offload(self, *kinds: Resident) -> None:
        """Free the GPU's memory of what the configuration says may leave it until it is needed again."""
        for kind in kinds:
            if kind in self.offloads:
                self.offloads[kind].out()

    def bring_back(self, *kinds: Resident) -> None:
        """The opposite."""
        for kind in kinds:
            if kind in self.offloads:
                self.offloads[kind].back()

    @property
    def replica(self) -> int:
        """Which copy of the model this rank is part of."""
        return self._training.replica

    @property
    def leads_replica(self) -> bool:
        """Whether this rank is handed its copy's share of the data."""
        return self._training.leads_replica

    def to_replica(self, value: T | None) -> T:
        """What the replica's first rank has, on all its ranks."""
        return self._training.to_replica(value)

    def save(self, folder: Path, in_background: bool = False) -> None:
        """Write model, optimizer, schedule and random state into `folder`; see `TrainingBackend.save`.

        All of it is on the GPU afterwards, as after `load`.
        """
        self.bring_back("weight", "optimizer")
        self._folder = folder
        with told_as_disk_trouble(folder):
            self._training.save(folder, in_background)

    def finish_save(self) -> None:
        """Wait for a save in the background."""
        with told_as_disk_trouble(self._folder):
            self._training.finish_save()

    def load(self, folder: Path, *, verified: bool = False) -> None:
        """Go on from `save`, also with another number of ranks or another layout.

        Args:
            folder: what `save` wrote, in a complete checkpoint.
            verified: the files have been compared with their sums already; otherwise one rank does it now.

        Raises:
            UserError: damaged, of another model, or of the other backend.
        """
        if not verified:
            verify_by_first_rank(folder)
        self.bring_back("weight", "optimizer")
        self._training.load(folder)
