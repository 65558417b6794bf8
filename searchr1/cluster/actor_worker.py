"""ActorGroup: the policy's training ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlinf.scheduler import Worker

from searchr1.agent.trajectory import Trajectory
from searchr1.cluster import channels
from searchr1.cluster.failure import reported
from searchr1.config.schema import Config
from searchr1.device import Device

if TYPE_CHECKING:
    from searchr1.rollout.weights import WeightPublisher


@dataclass(slots=True)
class ActorShare:
    """One rank's part of a step."""

    trajectories: list[Trajectory]
    advantages: list[Any]
    """One number per trajectory, or an array [N] with one per response token."""
    minibatch_ids: list[int]
    """Which optimizer step of this rollout step each trajectory belongs to."""


class ActorWorker(Worker):
    """One rank of the policy."""

    def __init__(self, config: Config, device: Device, channel: Any, optimizer_steps: int) -> None:
        super().__init__()
        self._config = config
        self._optimizer_steps = optimizer_steps
        self._device = device
        self._channel = channel
        self._publisher: WeightPublisher | None = None
        os.environ.update(device.worker_env("actor", self._world_size))

    @reported
    async def start(self) -> None:
        """Join the process group and load the model and the optimizer."""
        import torch

        from searchr1.learner.policy import Policy

        # Ray starts workers with one OpenMP thread.
        torch.set_num_threads(self._device.threads_for("actor", self._world_size))
        self._policy = Policy.start(self._config, self._device, self._optimizer_steps)
        self._leave_gpu()

    @reported
    async def train_step(self) -> dict[str, float]:
        """Train on this data-parallel rank's share of the step, from the channel. Return metrics of all ranks."""
        timeout_s = self._config.runner.step_timeout_s
        share: ActorShare = await channels.get_share(self._channel, self._policy, channels.actor_key, timeout_s)
        metrics = self._policy.train_step(share.trajectories, share.advantages, share.minibatch_ids)
        self._device.empty_cache()  # the engine on the same GPU wakes up next
        return metrics

    @reported
    async def publish_weights(self, version: int) -> Any:
        """Write the first bucket of weights where the rollout group can map it. Rank 0 returns its manifest."""
        from searchr1.rollout.shared_memory import weight_directory, weight_folders
        from searchr1.rollout.weights import WeightPublisher, bucket_size, same_buckets

        lora = self._config.actor.lora
        if lora.rank and lora.weight_update == "adapter":
            return self._publish_adapter(version)
        named, elements = self._policy.named_weights(), self._policy.backend.parameter_count
        size = bucket_size(elements, self._policy.rollout_dtype)
        self._policy.reload("weight")
        self._buckets: Iterator[Any]
        if self._rank == 0:
            if self._publisher is None:
                root = weight_directory(2 * size, weight_folders(self._config.runner.output_dir)[1])
                self._publisher = WeightPublisher(root, size)
            self._buckets = self._publisher.publish(named, version, elements)
        else:  # gathering a tensor takes all ranks
            self._buckets = same_buckets(named, size)
        return next(self._buckets)

    def _publish_adapter(self, version: int) -> Any:
        """LoRA's matrices alone, all at once."""
        from searchr1.checkpoints.lora import peft_settings
        from searchr1.rollout.shared_memory import weight_directory, weight_folders
        from searchr1.rollout.weights import publish_adapter

        self._policy.reload("weight")
        named, lora = list(self._policy.named_adapters()), self._config.actor.lora
        if self._rank != 0:
            return None
        size = sum(tensor.nbytes for _, tensor in named)
        root = weight_directory(size, weight_folders(self._config.runner.output_dir)[1])
        return publish_adapter(named, version, root, peft_settings(lora.rank, lora.alpha, lora.target_modules))

    @reported
    async def next_bucket(self) -> Any:
        """The next bucket, after one that was not the last."""
        return next(self._buckets)

    @reported
    async def release_weights(self, manifest: Any) -> None:
        """End an update that everyone has taken over."""
        self._buckets = iter(())  # it holds the last tensor
        self._policy.offload("weight")
        self._device.empty_cache()
        if self._publisher is not None:
            self._publisher.release()
        elif self._rank == 0:
            from searchr1.rollout.weights import release

            release(manifest)

    @reported
    async def probe_logprobs(self, sequences: list[list[int]]) -> list[list[float]]:
        """Log-probability of each token of each sequence (0 for the first) under the current weights."""
        self._policy.reload("weight")
        logprobs = self._policy.probe_logprobs(sequences)
        self._leave_gpu()
        return logprobs

    @reported
    async def save(self, folder: Path, in_background: bool) -> None:
        """Write this rank's part of a checkpoint into `folder`, or begin to."""
        self._policy.save(folder, in_background)
        self._leave_gpu()

    @reported
    async def finish_save(self) -> None:
        """Wait until a save in the background has been written."""
        self._policy.finish_save()

    @reported
    async def load(self, folder: Path) -> None:
        """Continue from a checkpoint, which the runner has verified."""
        self._policy.load(folder, verified=True)
        self._leave_gpu()

    def _leave_gpu(self) -> None:
        """As far as `actor.offload_…` says so."""
        self._policy.offload("weight", "grad", "optimizer")
        self._device.empty_cache()
