"""What the policy and the critic have in common: micro-batches, checkpoints, tensors that leave the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from searchr1.agent.trajectory import Trajectory
from searchr1.learner.backend import ModelPart, T, TrainingBackend
from searchr1.learner.checkpoint import disk_errors_named, verify_on_first_rank
from searchr1.learner.offload import Offload
from searchr1.learner.packing import FloatArray, PackedBatch, pack, plan_micro_batches, sequence_length
from searchr1.learner.stats import all_reduce_max
from searchr1.learner.trainer_config import Resident, TrainerConfig


def micro_batches(
    part: ModelPart,
    max_tokens: int,
    trajectories: Sequence[Trajectory],
    *,
    advantages: Sequence[float | FloatArray] | None = None,
    old_logprobs: Sequence[FloatArray] | None = None,
    returns: Sequence[FloatArray] | None = None,
    old_values: Sequence[FloatArray] | None = None,
) -> list[PackedBatch]:
    """Return packed micro-batches on the model's device, as many on every rank; a collective. See `pack`."""
    count = len(plan_micro_batches([sequence_length(t) for t in trajectories], max_tokens))
    agreed = all_reduce_max(count, part.device, part.data_group)
    batches = pack(
        trajectories,
        max_tokens,
        advantages=advantages,
        old_logprobs=old_logprobs,
        returns=returns,
        old_values=old_values,
        at_least=agreed,
    )
    return [batch.to(part.device) for batch in batches]


class TrainedModel:
    """One rank of a model in training. Every method is a collective."""

    backend: TrainingBackend

    def __init__(self, backend: TrainingBackend, trainer: TrainerConfig) -> None:
        self.backend = backend
        # A CPU has only host memory. "grad" is not kept: gradients do not outlive a step.
        kinds = sorted(trainer.offloads) if backend.device.type == "cuda" else []
        self.offloads: dict[Resident, Offload] = {
            kind: Offload(partial(backend.resident, kind), keep=kind != "grad") for kind in kinds
        }
        self._folder: Path | None = None

    def offload(self, *kinds: Resident) -> None:
        """Free the GPU's memory of what `actor.offload_*` names, until it is reloaded."""
        for kind in kinds:
            if kind in self.offloads:
                self.offloads[kind].out()

    def reload(self, *kinds: Resident) -> None:
        """Bring back what `offload` took away."""
        for kind in kinds:
            if kind in self.offloads:
                self.offloads[kind].back()

    @property
    def dp_rank(self) -> int:
        """Data-parallel rank: which copy of the model this process is part of."""
        return self.backend.dp_rank

    @property
    def is_dp_leader(self) -> bool:
        """Whether this process takes its data-parallel rank's share of the data."""
        return self.backend.is_dp_leader

    def broadcast_from_dp_leader(self, value: T | None) -> T:
        """Return the leader's value on all processes of the data-parallel rank."""
        return self.backend.broadcast_from_dp_leader(value)

    def save(self, folder: Path, in_background: bool = False) -> None:
        """Write model, optimizer, schedule and random state into `folder`; see `TrainingBackend.save`.

        All of it is on the GPU afterwards, as after `load`.

        Raises:
            UserError: the disk is full or not writable.
        """
        self.reload("weight", "optimizer")
        self._folder = folder
        with disk_errors_named(folder):
            self.backend.save(folder, in_background)

    def finish_save(self) -> None:
        """Wait for a save in the background; do nothing without one.

        Raises:
            UserError: the disk is full or not writable.
        """
        if self._folder is not None:
            with disk_errors_named(self._folder):
                self.backend.finish_save()

    def load(self, folder: Path, *, verified: bool = False) -> None:
        """Go on from `save`, also with another number of ranks or another layout.

        Args:
            folder: what `save` wrote, in a complete checkpoint.
            verified: the files have been compared with their sums already; otherwise one rank does it now.

        Raises:
            UserError: damaged, of another model, or of the other backend.
        """
        if not verified:
            verify_on_first_rank(folder)
        self.reload("weight", "optimizer")
        self.backend.load(folder)
